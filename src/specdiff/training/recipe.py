"""Recipes: every setting that decides what a training run computes, checked before it starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from specdiff.data import records
from specdiff.errors import UsageError
from specdiff.training.objectives import DIVERGENCES, WEIGHTS

RECIPES = Path(__file__).parent / "recipes"
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Recipe(BaseModel):
    """The settings of one run; unknown keys are refused.

    Sizes left null are the target's; docs/train-a-drafter.md says when to change what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["sedd", "autoregressive", "block", "target"]

    # the network
    # "target" (its first and last layers), a drafter's folder or hub id, or null: from scratch
    init: str | None = None
    blocks: Count = 2
    hidden_size: Count | None = None
    heads: Count | None = None
    borrow_embeddings: bool = True
    draft_vocab: Count | None = 8192  # null: the whole vocabulary
    attention: Literal["causal-context", "bidirectional"] = "causal-context"
    context_window: Count | None = 128  # committed tokens a draft sees
    time_conditioning: bool = False
    process: Literal["absorb", "uniform"] = "absorb"
    schedule: Literal["loglinear", "geometric"] = "loglinear"
    taps: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # block, sedd: target layers read
    markov_rank: Annotated[int, Field(ge=0)] = 64  # block: of the previous token's part; 0: none
    direct: bool = True  # block: a path from the last context state into every slot
    intermediate_size: Count | None = None  # block
    mask_token_id: Annotated[int, Field(ge=0)] | None = None  # block; null: one the corpus lacks
    length: Count = 1024  # maximum positions of a bidirectional network
    dropout: Share = 0.0

    # what it learns
    objective: Literal["score_entropy", "denoise", "distill"] = "distill"
    divergence: str = "hybrid"  # distill only
    eta: Annotated[float, Field(ge=0)] = 3.0  # hybrids: how soon acceptance outweighs KL
    truth_share: Share = 0.0  # distill only: share of cross-entropy on the corpus's own tokens
    drafting_share: Share = 1.0  # share of batches corrupted as in drafting; the others: uniform t
    draft_lens: tuple[Count, ...] = (2, 4, 4, 8)  # one of them is drawn per batch
    canvas_tokens: Count = 512  # drafted positions per row and batch
    revealed: Share = 0.15  # share of canvases with a revealed start, as between passes
    weights: str = "exponential"  # over the positions of a draft
    weight_scale: Annotated[float, Field(gt=0)] = 6.0
    # initial weight of the context's own next-token loss; decays to 0 (causal context)
    auxiliary: Annotated[float, Field(ge=0)] = 0.5

    # how it is optimized
    steps: Count = 3000
    rows: Count = 4  # per process and accumulated batch
    accumulation: Count = 1
    lr: Annotated[float, Field(gt=0)] = 1.5e-3
    warmup: Annotated[int, Field(ge=0)] = 100
    final_lr: Share = 0.02  # as a share of lr, at the end of the cosine
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Share, Share] = (0.9, 0.98)
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it
    seed: Annotated[int, Field(ge=0, lt=1 << 23)] = 0  # keeps the keys of all draws in 63 bits

    # what is saved and measured
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    draft_len: Count = 4  # what the finished drafter proposes per round
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    save_every: Count = 250
    eval_every: Count = 1000
    eval_prompts: Count = 8
    eval_tokens: Count = 48
    log_every: Count = 10

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence {self.divergence!r} is unknown; known are {', '.join(DIVERGENCES)}"
            )
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights {self.weights!r} is unknown; known are {', '.join(WEIGHTS)}")
        if not self.draft_lens:
            raise ValueError("draft_lens must name at least one draft length")
        return self

    @model_validator(mode="after")
    def _network_fits_objective(self) -> Self:
        scores = self.objective == "score_entropy"
        if self.kind == "sedd" and self.attention == "causal-context":
            if scores or self.drafting_share < 1:
                raise ValueError(
                    "score_entropy and uniform t (drafting_share < 1) need attention: bidirectional"
                )
            if self.time_conditioning or self.process == "uniform":
                raise ValueError(
                    "a causal context is cached, so it needs time_conditioning: false "
                    "and process: absorb"
                )
        if self.process == "uniform" and (not scores or self.drafting_share > 0):
            raise ValueError(
                "the uniform process has no MASK: it needs objective: score_entropy "
                "and drafting_share: 0"
            )
        if scores and self.draft_vocab is not None:
            raise ValueError("score_entropy needs the whole vocabulary: draft_vocab: null")
        if scores and self.kind != "sedd":
            raise ValueError(
                f"score_entropy trains a diffusion network; kind: {self.kind} takes denoise "
                f"(cross-entropy) or distill"
            )
        if self.taps and self.kind not in ("sedd", "block"):
            raise ValueError(f"kind: {self.kind} reads no layers of the target: taps: null")
        cached = self.attention == "causal-context" and self.borrow_embeddings
        if self.taps and self.kind == "sedd" and not cached:
            raise ValueError("taps need attention: causal-context and borrow_embeddings: true")
        longest = max(self.draft_lens)
        if self.kind == "block" and self.draft_len > longest:
            raise ValueError(
                f"a block drafter cannot draft more tokens (draft_len {self.draft_len}) than it "
                f"is trained on (draft_lens up to {longest})"
            )
        if self.kind == "block" and not self.borrow_embeddings:
            raise ValueError("a block drafter borrows the target's tables: borrow_embeddings: true")
        if self.kind == "target" and self.objective != "denoise":
            raise ValueError("kind: target learns its data set: objective: denoise (cross-entropy)")
        return self


def names() -> list[str]:
    """The recipes packaged with specdiff."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(source: str, changes: Sequence[str] = ()) -> Recipe:
    """A packaged recipe by name or a YAML file, with `key=value` changes.

    Raises UsageError naming the file, the key and what is allowed.
    """
    path = RECIPES / f"{source}.yaml" if source in names() else Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no recipe {source!r}; known are {', '.join(names())}, or a FILE.yaml")
    try:
        data = yaml.safe_load(records.read_text(path))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold key: value lines, not a {type(data).__name__}")
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise UsageError(f"--set takes key=value, not {change!r}")
        try:
            data[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--set {change!r}: the value is not valid YAML") from None
    return checked(data, str(path))


def checked(data: dict[str, Any], where: str) -> Recipe:
    """The recipe a mapping describes. Raises UsageError naming the first bad key."""
    try:
        return Recipe(**data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"{where}: unknown key {key!r}; known are {', '.join(Recipe.model_fields)}"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        value = f"{key} = {_at(data, first['loc'])!r}: " if key else ""
        raise UsageError(f"{where}: {value}{message}") from None


def _at(data: Any, location: Sequence[Any]) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return data
    return data


def as_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load` reads back."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
