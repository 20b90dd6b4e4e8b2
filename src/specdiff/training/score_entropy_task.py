"""Training a SEDD drafter: canvases behind a causal context in one pass, or whole corrupted rows (the paper's own way).

Shapes: B rows, L tokens, N canvases a row, G tokens a canvas, C columns of the logits, H width, n counted positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from specdiff.data.corpus import Corpus
from specdiff.diffusion.process import Absorbing, Uniform
from specdiff.diffusion.schedule import Geometric, Loglinear, Schedule
from specdiff.nn.ddit import SEDD
from specdiff.training import canvases, objectives
from specdiff.training.recipe import Recipe
from specdiff.training.task import DrafterTask, TensorDict, mean, weighted_mean
from specdiff.training.teacher import Teacher


class SEDDTask(DrafterTask):
    """Canvases where the network's context is causal, whole rows where it is bidirectional."""

    network: SEDD

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        network: SEDD,
        head: Tensor | None,
        teacher: Teacher | None,
        about: Mapping[str, Any],
    ) -> None:
        config = network.config
        vocab = network.draft_vocab if config.draft_vocab_size is not None else None
        super().__init__(recipe, corpus, vocab, config.tokens, head, teacher, about)
        self.network = network
        self.process = (
            Absorbing(config.tokens) if config.process == "absorb" else Uniform(config.tokens)
        )
        self.schedule: Schedule = (
            Loglinear()
            if config.schedule == "loglinear"
            else Geometric(config.sigma_min, config.sigma_max)
        )
        self.causal = config.attention == "causal-context"

    def prepare(self, rows: Sequence[int], generator: torch.Generator) -> TensorDict:
        batch = self.rows(rows)
        recipe = self.recipe
        draft_len = recipe.draft_lens[
            int(torch.randint(len(recipe.draft_lens), (1,), generator=generator))
        ]
        if self.causal:
            count = max(1, recipe.canvas_tokens // draft_len)
            batch["anchors"] = canvases.pick_anchors(
                batch["lengths"], batch["prompts"], count, generator
            )
            batch["revealed"] = canvases.pick_revealed(
                batch["anchors"].shape, draft_len, recipe.revealed, generator
            )
            batch["draft_len"] = torch.tensor(draft_len)
        else:
            batch |= self._corrupted(batch, draft_len, generator)
        if self.teacher is not None:
            batch["states"], batch["log_z"] = self.teacher(rows, batch["ids"])
        return batch

    def forward(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        if self.causal:
            return self._on_canvases(batch, progress)
        return (
            self._score_entropy(batch)
            if self.recipe.objective == "score_entropy"
            else self._on_masks(batch)
        )

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        written = SEDD(replace(self.network.config, dropout=0.0))
        written.load_state_dict(state)
        written.save_pretrained(
            folder,
            getattr(torch, self.recipe.save_dtype),
            draft_len=self.recipe.draft_len,
            **self.about,
        )

    # canvases behind a causal context

    def canvas_logits(
        self, batch: TensorDict
    ) -> tuple[canvases.Canvases, Float[Tensor, "B N G C"], Float[Tensor, "B L H"]]:
        """Logits of every canvas position (what the decode path computes one canvas at a time), and the clean states."""
        laid, states = self._states(batch)
        L = batch["ids"].shape[1]
        return laid, self.network.logits(states[:, L:].view(*laid.slot.shape, -1)), states[:, :L]

    def _states(self, batch: TensorDict) -> tuple[canvases.Canvases, Float[Tensor, "B T H"]]:
        config = self.network.config
        laid = canvases.lay_out(
            batch["ids"],
            batch["lengths"],
            batch["anchors"],
            batch["revealed"],
            int(batch["draft_len"]),
            config.context_window,
            config.tokens,
        )
        sigma = torch.zeros(len(batch["ids"]), device=batch["ids"].device)
        return laid, self.network.hidden(laid.ids, sigma, mask=laid.mask, positions=laid.positions)

    def _on_canvases(self, batch: TensorDict, progress: float) -> tuple[Tensor, TensorDict]:
        laid, states = self._states(batch)
        B, L = batch["ids"].shape
        counted = laid.hidden & laid.inside
        row = torch.arange(B, device=counted.device)[:, None, None].expand_as(counted)[counted]
        logits = self.network.logits(states[:, L:].view(*laid.slot.shape, -1)[counted])
        judged = self.judge(logits, batch, row, laid.slot[counted])
        q = torch.where(laid.inside, 1.0, 0.0).masked_scatter(
            counted, judged.q
        )  # revealed positions are given: accepted
        weight = objectives.WEIGHTS[self.recipe.weights](q, self.recipe.weight_scale)
        loss = weighted_mean(judged.loss, weight[counted])
        fresh = laid.hidden[..., 0] & laid.inside[..., -1]
        told = {
            "q1": mean(q[..., 0][fresh]),
            "expected_tau": 1 + mean(objectives.expected_accepted(q)[fresh]),
        }
        auxiliary = self.recipe.auxiliary * (1 - progress)
        if auxiliary > 0:
            loss = loss + auxiliary * self._next_token(states[:, :L], batch)
        return loss, told

    def _next_token(self, states: Float[Tensor, "B L H"], batch: TensorDict) -> Float[Tensor, ""]:
        """Clean positions foretell their successor: it builds the features that canvases then read, almost for free."""
        ids, lengths = batch["ids"], batch["lengths"]
        following = torch.full_like(ids, -1)
        following[:, :-1] = self.columns[ids[:, 1:]]
        known = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None] - 1) & (
            following >= 0
        )
        return mean(objectives.denoise(self.network.logits(states[known]), following[known]))

    # whole corrupted rows

    def _corrupted(
        self, batch: TensorDict, draft_len: int, generator: torch.Generator
    ) -> TensorDict:
        config, recipe = self.network.config, self.recipe
        drafted = bool(torch.rand((), generator=generator) < recipe.drafting_share)
        if drafted:
            assert isinstance(self.process, Absorbing)
            anchors = canvases.pick_anchors(batch["lengths"], batch["prompts"], 1, generator)[:, 0]
            window = min(recipe.context_window or config.length, config.length - draft_len)
            made = canvases.as_drafted(
                batch["ids"],
                batch["lengths"],
                anchors,
                draft_len,
                window,
                self.process.mask_id,
                self.schedule,
            )
        else:
            made = canvases.at_uniform_time(
                batch["ids"],
                batch["lengths"],
                config.length,
                self.process,
                self.schedule,
                generator,
            )
        names = ("x0", "x", "t", "real", "start", "drafted")
        return {name: getattr(made, name) for name in names} | {
            "draft_len": torch.tensor(draft_len if drafted else 0)
        }

    def _score_entropy(self, batch: TensorDict) -> tuple[Tensor, TensorDict]:
        """The authors' loss, per token; drafting-shaped rows count their MASK alone, t times, which is nats per MASK."""
        t, real = batch["t"], batch["real"]
        log_score = self.network(batch["x"], self.schedule.total(t), mask=real[:, None, None])
        loss = objectives.score_entropy(
            self.process, self.schedule, log_score, t, batch["x"], batch["x0"]
        )
        if batch["draft_len"] > 0:
            return weighted_mean(loss * t[:, None], (batch["drafted"] >= 0).float()), {}
        return weighted_mean(loss, real.float()), {}

    def _on_masks(self, batch: TensorDict) -> tuple[Tensor, TensorDict]:
        x, t, real, drafted = batch["x"], batch["t"], batch["real"], batch["drafted"]
        at = batch["start"][:, None] + torch.arange(x.shape[1], device=x.device)
        counted = (
            (x == self.network.config.mask_id) & real & (at > 0) & (at < batch["lengths"][:, None])
        )  # nothing foretells position 0
        states = self.network.hidden(x, self.schedule.total(t), mask=real[:, None, None])
        logits = self.network.logits(states[counted])[..., : self._tokens]
        row = torch.arange(len(x), device=x.device)[:, None].expand_as(x)[counted]
        judged = self.judge(logits, batch, row, at[counted])
        if not batch["draft_len"] > 0:
            over_t = judged.loss / t[row]
            return over_t.sum() / real.sum(), {}
        q = judged.q.new_zeros(len(x), int(batch["draft_len"]))
        q = q.index_put((row, drafted[counted]), judged.q)
        weight = objectives.WEIGHTS[self.recipe.weights](q, self.recipe.weight_scale)
        told = {"q1": q[:, 0].mean(), "expected_tau": 1 + objectives.expected_accepted(q).mean()}
        return weighted_mean(judged.loss, weight[row, drafted[counted]]), told

    @property
    def _tokens(self) -> int:
        """Columns of the network's logits that are words: all but MASK."""
        return self.network.config.draft_vocab_size or self.network.config.tokens
