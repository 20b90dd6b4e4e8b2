"""The autoregressive baseline: its cache, vocabularies, folder, and exact probabilities."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from specdiff import catalog, decode
from specdiff.drafters import autoregressive as module
from specdiff.drafters.autoregressive import AutoregressiveDrafter, autoregressive
from specdiff.drafters.cascade import CascadeDrafter
from specdiff.errors import ConfigError, DrafterError, UnknownNameError, UsageError, WeightsError
from specdiff.models import packed
from specdiff.nn.small_lm import SmallLM
from specdiff.noise import Noise, Purpose
from specdiff.sampling import draw
from specdiff.types import Batch, Context, Draft, SamplingParams, TargetInfo
from specdiff.verify import VERIFIERS

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [7], [2, 7, 1, 8, 2])
BORROWED = {"borrow_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "borrowed": BORROWED,
    "draft-vocab": {**BORROWED, "draft_vocab_size": 20},
}


def info(**changes: Any) -> TargetInfo:
    embedding, head = torch.randn(
        2, tiny.VOCAB, tiny.WIDTH, generator=torch.Generator().manual_seed(9)
    )
    return replace(
        TargetInfo(
            "tiny",
            tiny.VOCAB,
            tiny.WIDTH,
            2,
            256,
            torch.float32,
            torch.device("cpu"),
            embedding,
            head / 4,
        ),
        **changes,
    )


def network(family: str = "llama", seed: int = 1, positions: int = 256, **ours: Any) -> SmallLM:
    """Random, and sharp enough that every token hangs on those before it."""
    base = tiny.model(family, seed=seed, positions=positions)
    base.config.update(ours)
    instance = SmallLM(base.config)
    instance.load_state_dict(
        {f"net.{name}": tensor for name, tensor in base.state_dict().items()}, strict=False
    )
    if instance.draft_vocab_size is not None:
        ids = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(2))[
            : instance.draft_vocab_size
        ]
        instance.draft_vocab.copy_(ids.sort().values)
    return instance


def drafter(shape: str = "full", family: str = "llama", **options: Any) -> AutoregressiveDrafter:
    return AutoregressiveDrafter(network(family, **SHAPES[shape]), info(), **options)


def context(batch: Batch) -> Context:
    return Context(batch, None, torch.zeros_like(batch.length), None)


def propose(
    drafter: AutoregressiveDrafter, batch: Batch, draft_len: int, state: Any = None
) -> Draft:
    """A draft, its probabilities over all ids."""
    if state is None:
        state = drafter.open(len(batch.length), batch.ids.shape[1] + draft_len + 1)
        drafter.admit(state, context(batch), torch.arange(len(batch.length)))
    with torch.inference_mode():
        draft = drafter.propose(context(batch), state, Noise.of(batch), draft_len)
    return replace(draft, probs=draft.full_probs(tiny.VOCAB), columns=None)


def committed(batch: Batch, rows: list[list[int]]) -> Batch:
    """The batch after each row was given more tokens: what `decode` would do."""
    ids, length = batch.ids.clone(), batch.length.clone()
    for b, new in enumerate(rows):
        ids[b, length[b] : length[b] + len(new)] = torch.tensor(new, dtype=torch.long)
        length[b] += len(new)
    return replace(batch, ids=ids, length=length, round=batch.round + 1)


def recomputed(drafter: AutoregressiveDrafter, batch: Batch, draft: Draft) -> Tensor:
    """q from one plain pass a row over its committed tokens and its draft, without any cache."""
    model, rows = drafter.model, []
    for ids, n, tokens in zip(batch.ids, batch.length.tolist(), draft.tokens, strict=True):
        with torch.no_grad():
            states = model.hidden(torch.cat([ids[:n], tokens[:-1]])[None])[0, n - 1 :]
            q = model.logits(states).softmax(-1)
        columns = (
            model.draft_vocab if model.draft_vocab_size is not None else torch.arange(tiny.VOCAB)
        )
        rows.append(torch.zeros(len(tokens), tiny.VOCAB).index_copy(1, columns, q))
    return torch.stack(rows)


def fed(drafter: AutoregressiveDrafter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens a row each pass of the network reads."""
    sizes: list[int] = []
    whole = drafter.ragged.forward
    monkeypatch.setattr(
        drafter.ragged,
        "forward",
        lambda cache, ids, at, **k: sizes.append(ids.shape[1]) or whole(cache, ids, at, **k),
    )
    return sizes


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [512, 3])
def test_cached_equals_recomputed(
    shape: str, family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rounds that accept all, some and nothing, of different draft and row lengths."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    ours, batch = drafter(shape, family), tiny.batch_of(PROMPTS, max_tokens=60)
    state = ours.open(3, 80)
    ours.admit(state, context(batch), torch.arange(3))
    for K, accepted in [
        (5, (5, 0, 2)),
        (1, (0, 1, 1)),
        (6, (1, 6, 5)),
        (2, (0, 0, 0)),
        (8, (3, 7, 0)),
        (3, (2, 3, 1)),
    ]:
        draft = propose(ours, batch, K, state)
        torch.testing.assert_close(draft.probs, recomputed(ours, batch, draft), rtol=0, atol=2e-5)
        new = [
            [*row[:n], (row[min(n, K - 1)] + 1) % tiny.VOCAB]
            for row, n in zip(draft.tokens.tolist(), accepted, strict=True)
        ]
        batch = committed(batch, new)


def test_a_rejected_drafts_entries_are_forgotten() -> None:
    """A short draft leaves a longer one's entries after it; the text then has its tokens."""
    ours, batch = drafter(), tiny.batch_of(PROMPTS, max_tokens=60)
    state = ours.open(3, 80)
    draft = propose(ours, batch, 6, state)
    batch = committed(batch, [[(row[0] + 1) % tiny.VOCAB] for row in draft.tokens.tolist()])
    propose(ours, batch, 1, state)
    batch = committed(batch, [row[1:5] for row in draft.tokens.tolist()])
    draft = propose(ours, batch, 3, state)
    torch.testing.assert_close(draft.probs, recomputed(ours, batch, draft), rtol=0, atol=2e-5)


def test_tokens_behind_a_rejected_one_are_read() -> None:
    """Plain rounds may emit a rejected draft's later tokens: its entries do not apply."""
    ours, batch = drafter(), tiny.batch_of(PROMPTS, max_tokens=60)
    state = ours.open(3, 80)
    draft = propose(ours, batch, 6, state)
    batch = committed(
        batch, [[(row[0] + 1) % tiny.VOCAB, *row[1:5]] for row in draft.tokens.tolist()]
    )
    draft = propose(ours, batch, 3, state)
    torch.testing.assert_close(draft.probs, recomputed(ours, batch, draft), rtol=0, atol=2e-5)


def test_tokens_of_rounds_without_a_draft_are_read() -> None:
    ours, batch = drafter(), tiny.batch_of(PROMPTS, max_tokens=60)
    state = ours.open(3, 80)
    for new in ([[4], [5, 6, 7], [8, 9]], [[1, 2, 3], [4], [5]]):
        batch = committed(committed(batch, new), new)
        draft = propose(ours, batch, 4, state)
        torch.testing.assert_close(draft.probs, recomputed(ours, batch, draft), rtol=0, atol=2e-5)


def test_accepted_tokens_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, batch = drafter(), tiny.batch_of(PROMPTS[:1], max_tokens=60)
    sizes, state = fed(ours, monkeypatch), ours.open(1, 80)
    for accepted, expected in [
        (2, [12, 1, 1, 1]),
        (4, [1, 1, 1, 1]),
        (0, [2, 1, 1, 1]),
        (3, [1, 1, 1, 1]),
        (0, [1, 1, 1, 1]),
    ]:
        sizes.clear()
        row = propose(ours, batch, 4, state).tokens[0].tolist()
        assert sizes == expected
        batch = committed(batch, [[*row[:accepted], (row[min(accepted, 3)] + 1) % tiny.VOCAB]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draft_temperature", [0.6, 1.0])
def test_q_is_the_law_the_tokens_were_drawn_from(shape: str, draft_temperature: float) -> None:
    """Each token is the inverse CDF of its own row, at its own uniform."""
    ours, batch = (
        drafter(shape, draft_temperature=draft_temperature),
        tiny.batch_of(PROMPTS * 20, temperature=0.8),
    )
    draft = propose(ours, batch, 5)
    assert draft.probs is not None
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(60, 5), rtol=0, atol=1e-5)
    assert torch.equal(draft.tokens, draw(draft.probs, Noise.of(batch).uniform(Purpose.DRAFT, 5)))
    q = recomputed(ours, batch, draft)
    expected = q.pow(1 / (0.8 * draft_temperature))
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(draft.probs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_drafts_are_point_masses_on_the_most_likely_tokens(shape: str) -> None:
    for sharpness, temperature in ((0.0, 0.8), (1.0, 0.0), (0.0, 0.0)):
        ours = drafter(shape, draft_temperature=sharpness)
        batch = tiny.batch_of(PROMPTS, temperature=temperature)
        draft = propose(ours, batch, 5)
        assert draft.probs is None
        assert torch.equal(draft.tokens, recomputed(ours, batch, draft).argmax(-1))


def test_the_draft_vocabulary_is_all_that_is_drafted() -> None:
    ours = drafter("draft-vocab")
    draft = propose(ours, tiny.batch_of(PROMPTS), 6)
    inside = torch.isin(torch.arange(tiny.VOCAB), ours.model.draft_vocab)
    assert draft.probs is not None
    assert (draft.probs[..., ~inside] == 0).all()
    assert (draft.probs[..., inside] > 0).all()
    assert torch.isin(draft.tokens, ours.model.draft_vocab).all()


def test_the_requests_filters_shape_q() -> None:
    draft = propose(drafter(), tiny.batch_of(PROMPTS, top_k=3), 4)
    assert draft.probs is not None
    assert ((draft.probs > 0).sum(-1) == 3).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_drafts_the_same_alone(shape: str) -> None:
    ours = drafter(shape)
    together = propose(ours, tiny.batch_of(PROMPTS), 5)
    for row, prompt in enumerate(PROMPTS):
        alone = propose(ours, tiny.batch_of([prompt], seeds=[row]), 5)
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        torch.testing.assert_close(alone.probs[0], together.probs[row], rtol=0, atol=2e-5)


def test_a_new_request_forgets_the_rows_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a prompt that begins alike is read anew: the last request must not show."""
    ours, old = drafter(), tiny.batch_of(PROMPTS)
    state = ours.open(3, 64)
    propose(ours, old, 6, state)
    row, joined = torch.tensor([0]), tiny.batch_of([[3, 1, 9]], seeds=[5])
    ours.release(state, row)
    batch = old.with_rows(row, joined)
    ours.admit(state, context(batch), row)
    sizes = fed(ours, monkeypatch)
    together = propose(ours, batch, 6, state)
    assert sizes == [3, 1, 1, 1, 1, 1]
    torch.testing.assert_close(together.probs, recomputed(ours, batch, together), rtol=0, atol=2e-5)


def test_two_streams_never_meet() -> None:
    ours = drafter()
    batches = [tiny.batch_of([PROMPTS[0]]), tiny.batch_of([PROMPTS[2]])]
    states = [ours.open(1, 64), ours.open(1, 64)]
    for new in ([4, 4], [1]):
        for state, batch in zip(states, batches, strict=True):
            torch.testing.assert_close(
                propose(ours, batch, 4, state).probs,
                propose(ours, batch, 4).probs,
                rtol=0,
                atol=2e-5,
            )
        batches = [committed(batch, [new]) for batch in batches]


# through the real loop


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_the_targets(family: str, shape: str) -> None:
    net, prompts = tiny.model(family), tiny.prompts(4)
    target = tiny.target(family)
    ours = AutoregressiveDrafter(network("llama", **SHAPES[shape]), target.info)
    texts = [tiny.plain(net, prompt, 16) for prompt in prompts]
    for draft_len, verifier in [(1, "token"), (4, "block"), (9, "match")]:
        batch = tiny.batch_of(prompts, 16, temperature=0.0)
        assert (
            tiny.decoded(target, ours, batch, draft_len=draft_len, verifier=VERIFIERS[verifier])
            == texts
        )


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9}, {"top_p": 0.8}])
def test_the_target_as_its_own_drafter_is_always_right(
    family: str, sampling: dict[str, Any]
) -> None:
    """q = p: every token is accepted; a law one position late or a stale entry would spoil that."""
    target = tiny.target(family)
    itself = tiny.model(family)
    ours = AutoregressiveDrafter(SmallLM(itself.config, itself), target.info)
    for last in decode.decode(
        target, ours, tiny.batch_of(tiny.prompts(4), 25, **sampling), draft_len=4
    ):
        assert last.verification.accepted[last.emitted > 0].tolist() == [4] * int(
            (last.emitted > 0).sum()
        )


def test_a_context_shorter_than_the_targets() -> None:
    """Past the drafter's last position the drafts are poor, the text is not."""
    target = tiny.target("gpt2")
    prompts = [list(range(30)), [5, 6], list(range(3, 20))]
    texts = [tiny.plain(tiny.model("gpt2"), prompt, 20) for prompt in prompts]
    for name in ("gpt2", "llama"):
        ours = AutoregressiveDrafter(network(name, positions=16), target.info)
        assert tiny.decoded(target, ours, tiny.batch_of(prompts, 20, temperature=0.0)) == texts
        batch = tiny.batch_of(prompts)
        draft = propose(ours, batch, 4)
        assert torch.equal(
            draft.tokens, draw(draft.probs, Noise.of(batch).uniform(Purpose.DRAFT, 4))
        )


def test_a_batch_wider_than_its_rows_can_grow() -> None:
    """`Batch.of(slots=...)` may give the ids more room than the roles were opened for."""
    target, prompts = tiny.target("llama"), tiny.prompts(2)
    params = [SamplingParams(max_tokens=12, temperature=0.0)] * 2
    wide = Batch.of(prompts, params, range(2), slots=200)
    assert tiny.decoded(target, drafter(), wide) == tiny.decoded(
        target, drafter(), Batch.of(prompts, params, range(2))
    )


def test_up_to_the_last_slot() -> None:
    """A state with no room for the whole draft."""
    ours, batch = drafter(), tiny.batch_of([[1, 2, 3], [4]], max_tokens=1)
    assert propose(ours, batch, 6, ours.open(2, 5)).tokens.shape == (2, 6)


# the network and its folder


def test_what_is_borrowed_is_neither_stored_nor_trained() -> None:
    model = network(**SHAPES["draft-vocab"]).borrow(info().embedding, info().head)
    body = tiny.model("llama").model.layers.state_dict()
    assert set(model.state_dict()) == {
        "draft_vocab",
        "net.model.norm.weight",
        *(f"net.model.layers.{name}" for name in body),
    }
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict()) - {
        "draft_vocab"
    }
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([PROMPTS[0]])
    logits = model.logits(model.hidden(ids))
    assert logits.shape == (1, 12, 20)
    logits.logsumexp(-1).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.parameters()
    )
    torch.testing.assert_close(
        logits, model.hidden(ids) @ info().head[model.draft_vocab].T, rtol=0, atol=1e-4
    )


def test_a_network_that_has_not_borrowed_says_nothing() -> None:
    model = network(**BORROWED)
    assert model.logits(model.hidden(torch.tensor([[1, 2]]))).isnan().all()


def test_padding_on_the_right_changes_nothing() -> None:
    model, ids = network(), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(ids)[:, :7], model.hidden(ids[:, :7]), rtol=0, atol=1e-5
        )


def test_tables_in_another_precision() -> None:
    """A float32 body between bf16 tables: products in float32, else the self-test fails."""
    coarse = info(
        embedding=info().embedding.bfloat16(), head=info().head.bfloat16(), dtype=torch.bfloat16
    )
    ours = AutoregressiveDrafter(network(**BORROWED), coarse)
    assert ours.error < 1e-3
    assert ours.model.hidden(torch.tensor([[1, 2]])).dtype == torch.float32


@pytest.mark.parametrize("family_", tiny.FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load(shape: str, family_: str, tmp_path: Path) -> None:
    before = network(family_, **SHAPES[shape])
    before.save_pretrained(tmp_path / "a" / "drafter", draft_len=6, targets=["tiny"])
    config = json.loads((tmp_path / "a" / "drafter" / "config.json").read_text())
    assert (config["draft_len"], config["targets"], config["model_type"]) == (6, ["tiny"], family_)
    assert not [f for f in (tmp_path / "a" / "drafter").iterdir() if f.name.startswith(".")]
    after = SmallLM.from_pretrained(tmp_path / "a" / "drafter")
    assert set(after.state_dict()) == set(before.state_dict())
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    ours = autoregressive(info(), tmp_path / "a" / "drafter")
    assert ours.draft_len == 6
    batch = tiny.batch_of(PROMPTS)
    assert torch.equal(
        propose(ours, batch, 3).tokens,
        propose(AutoregressiveDrafter(before, info()), batch, 3).tokens,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_in_bf16(shape: str, tmp_path: Path) -> None:
    """Half the bytes; the model in use and bf16 rotary frequencies are unchanged."""
    before = network(**SHAPES[shape])
    before.save_pretrained(tmp_path, torch.bfloat16, draft_len=2)
    assert before.net.dtype == torch.float32
    assert "draft_len" not in before.config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in (torch.float32, torch.bfloat16):
        after = SmallLM.from_pretrained(tmp_path, dtype)
        assert {p.dtype for p in after.parameters()} == {dtype}
        assert after.net.model.rotary_emb.inv_freq.dtype == torch.float32
        for name, parameter in before.named_parameters():
            assert torch.equal(after.get_parameter(name).float(), parameter.bfloat16().float())


def test_a_plain_checkpoint_in_shards(tmp_path: Path) -> None:
    base = tiny.model("llama")
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = autoregressive(info(), tmp_path)
    assert ours.draft_len == 4
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model.logits(ours.model.hidden(ids)), base(ids).logits, rtol=0, atol=1e-4
        )


# refusals


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"borrow_embeddings": "yes"}, "borrow_embeddings must be of type bool, not 'yes'"),
        (
            {"borrow_embeddings": True, "draft_vocab_size": 0},
            "draft_vocab_size must be at least 1, not 0",
        ),
        (
            {"borrow_embeddings": True, "draft_vocab_size": 49},
            "draft_vocab_size 49 is larger than the vocabulary of 48",
        ),
        ({"draft_vocab_size": 20}, "draft_vocab_size 20 .* needs borrow_embeddings true"),
    ],
)
def test_odd_keys_are_refused(ours: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        network(**ours)


@pytest.mark.parametrize(
    ("changes", "shape", "error", "message"),
    [
        ({"vocab_size": 50}, "full", DrafterError, "48 tokens.*'tiny' has 50"),
        ({"vocab_size": 47}, "borrowed", DrafterError, "48 tokens.*'tiny' has 47"),
        (
            {"embedding": None},
            "borrowed",
            DrafterError,
            "borrows its target's embedding and head, which 'tiny' does not offer",
        ),
        (
            {"head": None},
            "draft-vocab",
            DrafterError,
            "borrows its target's embedding and head, which 'tiny' does not offer",
        ),
        (
            {"embedding": torch.zeros(48, 16)},
            "borrowed",
            ConfigError,
            "embedding of 48 words x 32, but the target's is 48 x 16",
        ),
        (
            {"head": torch.zeros(50, 32)},
            "borrowed",
            ConfigError,
            "head of 48 words x 32, but the target's is 50 x 32",
        ),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(
    changes: dict[str, Any], shape: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoregressiveDrafter(network(**SHAPES[shape]), info(**changes))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_draft_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="draft_temperature must be a finite number >= 0"):
        drafter(draft_temperature=temperature)


def test_a_network_that_fails_the_self_test_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "specdiff.models.masks.causal",
        lambda at, slots, window=None: torch.ones(*at.shape, slots).bool()[:, None],
    )
    with pytest.raises(DrafterError, match=r"cannot draft from cached keys and values.*self-test"):
        drafter()


def test_a_family_the_cache_cannot_serve_is_refused() -> None:
    model = network()
    model.net.config.model_type = "bloom"
    with pytest.raises(DrafterError, match=r"cannot draft from cached keys and values.*bloom"):
        AutoregressiveDrafter(model, info())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network(**SHAPES["draft-vocab"]).save_pretrained(tmp_path)
    return tmp_path


def altered(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"draft_len": 0}, ConfigError, r"config\.json: draft_len must be at least 1, not 0"),
        ({"draft_len": "4"}, ConfigError, r"config\.json: draft_len must be of type int, not '4'"),
        (
            {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
            ConfigError,
            "its own code .auto_map., which is never run",
        ),
        ({"model_type": "nonsense"}, ConfigError, r"config\.json.*nonsense"),
        ({"num_attention_heads": 7}, ConfigError, r"config\.json.*multiple"),
        ({"num_hidden_layers": 3}, WeightsError, "lacks net.model.layers.2"),
        ({"intermediate_size": 65}, WeightsError, r"has shape \[64, 32\]|has shape \[32, 64\]"),
    ],
)
def test_a_damaged_config_is_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        autoregressive(info(), altered(folder, **changes))


@pytest.mark.parametrize("ids", [[-1], [tiny.VOCAB], [3, 3], [5, 2]])
def test_a_draft_vocabulary_out_of_range_or_order_is_refused(
    ids: list[int], tmp_path: Path
) -> None:
    model = network(**BORROWED, draft_vocab_size=len(ids))
    model.draft_vocab.copy_(torch.tensor(ids))
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="draft_vocab must hold ascending ids of the 48 words"):
        SmallLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", ["full", "draft-vocab"])
def test_damaged_weights_are_refused(shape: str, tmp_path: Path) -> None:
    network(**SHAPES[shape]).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        SmallLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        SmallLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(WeightsError, match="is a pickle"):
        SmallLM.from_pretrained(tmp_path)


def test_a_plain_checkpoint_of_other_sizes_is_refused(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    cases = [
        ({"num_hidden_layers": 3}, "lack .* more"),
        ({"num_hidden_layers": 2, "intermediate_size": 65}, r"hold .* in shape .*, not"),
    ]
    for changes, message in cases:
        with pytest.raises(WeightsError, match=message):
            SmallLM.from_pretrained(altered(tmp_path, **changes))


# names


def test_the_catalog_knows_folders_of_both_kinds(folder: Path) -> None:
    instance = catalog.drafter(str(folder), info(), {"draft_temperature": 0.5})
    assert isinstance(instance, AutoregressiveDrafter)
    assert instance.draft_temperature == 0.5
    with pytest.raises(UsageError, match=r"does not take these options.*steps"):
        catalog.drafter(str(folder), info(), {"steps": 2})
    for kind in ("bert-like", ["llama"], None):
        with pytest.raises(
            ConfigError,
            match=r"no drafter format with model_type .*; "
            r"known are sedd, mdlm, block \(DFlash, DSpark\) and transformers' causal LMs",
        ):
            catalog.drafter(str(altered(folder, model_type=kind)), info())


def test_bundled_drafters_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "BUNDLED", tmp_path)
    with pytest.raises(
        UnknownNameError,
        match="no bundled autoregressive drafter was trained for the target 'tiny'",
    ):
        catalog.drafter("autoregressive", info())
    network().save_pretrained(tmp_path / "a", targets=["tiny"])
    assert isinstance(catalog.drafter("autoregressive", info()), AutoregressiveDrafter)
    automatic = catalog.drafter("auto", info())
    assert isinstance(automatic, CascadeDrafter)
    assert isinstance(automatic.inner, AutoregressiveDrafter)
    assert catalog.drafter("auto", info(name="other")).draft_len == 0
    with pytest.raises(UnknownNameError, match="no bundled sedd drafter"):
        catalog.drafter("sedd", info())
    tiny.sedd(tiny.sedd_config()).save_pretrained(tmp_path / "b", targets=["tiny"])
    automatic = catalog.drafter("auto", info())
    assert isinstance(automatic, CascadeDrafter)
    assert not isinstance(automatic.inner, AutoregressiveDrafter)
    assert not isinstance(catalog.drafter("sedd", info()), AutoregressiveDrafter)
    assert isinstance(catalog.drafter("autoregressive", info()), AutoregressiveDrafter)


def test_sampled_text_through_every_verifier() -> None:
    """`match` gives the text of plain decoding, whatever drafts."""
    target = tiny.target("llama")
    requests = [SamplingParams(max_tokens=12, temperature=0.9)] * 3
    plain = tiny.decoded(
        target,
        catalog.drafter("none", target.info),
        Batch.of(PROMPTS, requests, [1, 2, 3]),
        verifier=VERIFIERS["match"],
    )
    for shape in SHAPES:
        ours = AutoregressiveDrafter(network(**SHAPES[shape]), target.info)
        assert (
            tiny.decoded(
                target, ours, Batch.of(PROMPTS, requests, [1, 2, 3]), verifier=VERIFIERS["match"]
            )
            == plain
        )


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_bfloat16_target_packs_its_drafter(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half = info(dtype=torch.bfloat16)
    assert half.embedding is not None and half.head is not None
    half = replace(half, embedding=half.embedding.bfloat16(), head=half.head.bfloat16())
    ours = dict(SHAPES[shape])

    def drafter() -> AutoregressiveDrafter:
        model = network(**ours)
        if model.draft_ids is not None:
            model.draft_ids.copy_(torch.arange(len(model.draft_ids)))
        model.net.to(torch.bfloat16)
        return AutoregressiveDrafter(model, half)

    plain = drafter()
    monkeypatch.setattr(packed, "LARGE", 1)
    rounded = drafter()
    layers = [m for m in rounded.model.modules() if isinstance(m, packed.Int8Linear)]
    assert rounded.model.net.get_output_embeddings() in layers
    assert len(layers) == 2 * 7 + 1  # both layers, and the head
    assert not any(isinstance(m, packed.Int8Linear) for m in plain.model.modules())
    batch = Batch.of(
        list(PROMPTS), [SamplingParams(max_tokens=8, temperature=1.0)] * 3, [0, 1, 2], slots=40
    )
    rows = torch.arange(3)
    q = []
    for one in (plain, rounded):
        state = one.open(3, 40)
        context = Context(batch, None, torch.zeros_like(batch.length), None)
        one.admit(state, context, rows)
        draft = one.propose(context, state, Noise.of(batch), 1)
        assert draft.probs is not None
        q.append(draft.probs)
    distance = (q[0] - q[1]).abs().sum(-1) / 2
    assert 0 < float(distance.max()) < 0.1
