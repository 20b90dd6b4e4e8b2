"""Prometheus metrics, under the names of vLLM's: dashboards need another prefix only."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specdiff.serve.live import LiveEngine
from specdiff.stats import Stats

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server. `prefix`: "specdiff", or "vllm" for its dashboards."""

    def __init__(self, prefix: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self._prefix = prefix
        self.running = self._gauge("num_requests_running", "Requests that have a row.")
        self.waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self.prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self.generated = self._counter("generation_tokens", "Tokens of answers.")
        self.success = self._counter("request_success", "Answers by end.", "finished_reason")
        self.drafts = self._counter("spec_decode_num_drafts", "Drafts.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self.positions = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted by draft position.", "position"
        )
        self.first = self._histogram("time_to_first_token_seconds", "Submission to first token.")
        self.total = self._histogram("e2e_request_latency_seconds", "Submission to last token.")

    def ended(self, prompt_tokens: int, stats: Stats, reason: str) -> None:
        """Count an answer that has ended."""
        self.prompt.labels(self.model).inc(prompt_tokens)
        self.generated.labels(self.model).inc(stats.tokens)
        self.success.labels(self.model, reason).inc()
        self.drafts.labels(self.model).inc(stats.rounds - stats.plain_rounds)
        self.drafted.labels(self.model).inc(stats.drafted)
        self.accepted.labels(self.model).inc(stats.accepted)
        for position, count in enumerate(stats.passed):
            self.positions.labels(self.model, str(position)).inc(count)

    def text(self, engine: LiveEngine) -> bytes:
        """The exposition text."""
        self.running.labels(self.model).set(engine.running)
        self.waiting.labels(self.model).set(engine.waiting)
        return bytes(generate_latest(self.registry))

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"{self._prefix}:{name}", help, ["model_name"], registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        names = ["model_name", *labels]
        return Counter(f"{self._prefix}:{name}", help, names, registry=self.registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(
            f"{self._prefix}:{name}", help, ["model_name"], buckets=SECONDS, registry=self.registry
        )
