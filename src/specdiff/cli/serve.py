"""`specdiff serve`: an HTTP server with the API of OpenAI."""

import sys
from typing import Annotated, Any

from specdiff.cli import params, terminal
from specdiff.errors import MissingExtraError, UsageError

SERVER = "Server"


def serve(
    model: params.Model = "smollm2-135m",
    device: params.Device = "auto",
    dtype: params.Dtype = "auto",
    compile: params.Compile = False,
    no_compile: params.NoCompile = False,
    max_model_len: params.MaxModelLen = 2048,
    model_options: params.ModelOptions = "{}",
    generation_config: params.GenerationConfig = "auto",
    drafter: params.DrafterSpec = "auto",
    draft_len: params.DraftLen = "",
    steps: params.Steps = None,
    order: params.Order = None,
    sampler: params.Sampler = None,
    draft_temperature: params.DraftTemperature = None,
    tree: params.Tree = None,
    verifier: params.VerifierName = "token",
    drafter_device: params.DrafterDevice = None,
    host: Annotated[str, params.option("Address.", panel=SERVER, variable="HOST")] = "127.0.0.1",
    port: Annotated[int, params.option("Port.", panel=SERVER, variable="PORT")] = 8000,
    api_key: Annotated[
        str | None,
        params.option("Key that clients must send.", panel=SERVER, variable="API_KEY"),
    ] = None,
    insecure: Annotated[
        bool,
        params.flag("Serve other machines without a key.", "--insecure", panel=SERVER),
    ] = False,
    served_model_name: Annotated[
        str | None,
        params.option("Name in answers.", panel=SERVER, variable="SERVED_MODEL_NAME"),
    ] = None,
    max_num_seqs: Annotated[
        int, params.option("Requests that run at a time.", panel=SERVER, variable="MAX_NUM_SEQS")
    ] = 8,
    kv_cache_memory: Annotated[
        str | None,
        params.option(
            "Most memory of the cache, such as 4GiB.", panel=SERVER, variable="KV_CACHE_MEMORY"
        ),
    ] = None,
    max_queue: Annotated[
        int, params.option("Requests that wait at most.", panel=SERVER, variable="MAX_QUEUE")
    ] = 256,
    queue_timeout: Annotated[
        float,
        params.option("Seconds that a request may wait.", panel=SERVER, variable="QUEUE_TIMEOUT"),
    ] = 300.0,
    request_timeout: Annotated[
        float,
        params.option("Seconds that a request may take.", panel=SERVER, variable="REQUEST_TIMEOUT"),
    ] = 1800.0,
    shutdown_timeout: Annotated[
        float,
        params.option(
            "Seconds to finish in on SIGTERM.", panel=SERVER, variable="SHUTDOWN_TIMEOUT"
        ),
    ] = 30.0,
    stream_chunk: Annotated[
        int | None,
        params.option(
            "Tokens of each event of a stream; hides what rounds accept.",
            panel=SERVER,
            variable="STREAM_CHUNK",
        ),
    ] = None,
    metrics_compat: Annotated[
        str,
        params.option("Metric names: specdiff or vllm.", panel=SERVER, variable="METRICS_COMPAT"),
    ] = "specdiff",
    config: params.Config = None,
) -> None:
    """Serve MODEL with the API of OpenAI.

    Example:  specdiff serve --port 8000 --drafter ngram
    """
    if metrics_compat not in ("specdiff", "vllm"):
        raise UsageError(f"--metrics-compat must be specdiff or vllm, not {metrics_compat!r}")
    if api_key == "":
        raise UsageError("--api-key is empty; give a key, or leave the option out")
    counts = {"--max-num-seqs": max_num_seqs, "--max-queue": max_queue}
    if stream_chunk is not None:
        counts["--stream-chunk"] = stream_chunk
    times = {
        "--queue-timeout": queue_timeout,
        "--request-timeout": request_timeout,
        "--shutdown-timeout": shutdown_timeout,
    }
    for name, value in (counts | times).items():
        if not value >= (1 if name in counts else 0):
            raise UsageError(f"{name} must be at least {1 if name in counts else 0}, not {value}")
    try:
        from specdiff.serve import guard, lifecycle, memory
        from specdiff.serve.app import build
    except ImportError as error:
        raise MissingExtraError(
            f"serve needs {error.name}: pip install 'specdiff[serve]'"
        ) from error
    import specdiff
    from specdiff.serve.choices import Limits
    from specdiff.serve.live import LiveEngine
    from specdiff.text.options import Options

    outside = host not in guard.LOOPBACK
    if outside and api_key is None and not insecure:
        raise UsageError(
            f"--host {host} is reachable from outside: give an --api-key, or --insecure"
        )
    most = None if kv_cache_memory is None else memory.size(kv_cache_memory, "--kv-cache-memory")
    address = lifecycle.bound(host, port)
    terminal.quiet_libraries()
    loading: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "compile": params.compile_mode(compile, no_compile),
        "max_len": max_model_len,
        "drafter_device": drafter_device,
        "drafter_options": params.drafter_options(steps, order, sampler, draft_temperature, tree),
        "model_options": params.json_object("--model-options", model_options),
        **params.sampling_defaults(generation_config),
    }
    lm = specdiff.load(model, drafter, **loading)
    options = Options(verifier=verifier, draft_len=params.draft_length(draft_len))
    built, length = lm.drafting(options)
    width = lm.max_len + (length if isinstance(length, int) else built.draft_len) + 1
    engine = LiveEngine(
        lm.target,
        built,
        options.build_verifier(),
        length,
        max_rows=max_num_seqs,
        max_len=lm.max_len,
        max_queue=max_queue,
        positions=memory.positions(lm.target, most, width),
    )
    app = build(
        lm,
        engine,
        name=served_model_name or model,
        api_key=api_key,
        hosts=None if outside or api_key is not None else guard.LOOPBACK,
        prefix=metrics_compat,
        limits=Limits(queue_timeout, request_timeout, shutdown_timeout),
        stream_chunk=stream_chunk,
    )
    lifecycle.log_to_stderr()
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{address.getsockname()[1]}/"
    info = lm.target.info
    address.listen()  # a client that waits for the next line is not refused
    print(
        f"{model} on {info.device}, {str(info.dtype).removeprefix('torch.')}: {url}v1, "
        f"playground at {url}\n" + memory.report(lm.target, max_num_seqs, width, engine.positions),
        file=sys.stderr,
    )
    lifecycle.run(app, engine, address, timeout=shutdown_timeout)
