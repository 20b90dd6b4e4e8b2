"""Train a SEDD drafter with borrowed embeddings on conversations its target wrote; any device, resumable after SIGKILL.

    python scripts/train_sedd.py --target TARGET_FOLDER --data conversations.safetensors --out runs/sedd --minutes 100

Objective: denoising cross-entropy at drafting-shaped corruption. One pass over a clean conversation (causal, banded) serves
many canvases: each canvas stands behind a random anchor, sees at most `context_window` clean tokens before it and itself,
and is all MASK, or (`--revealed` of the time) has its first tokens revealed, as between left-to-right passes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from specdiff.nn.config import SEDDConfig
from specdiff.nn.ddit import SEDD

IGNORE = -100


def target_tensors(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's (tied) embedding and final norm."""
    with safe_open(folder / "model.safetensors", "pt") as f:
        return f.get_tensor("model.embed_tokens.weight").float(), f.get_tensor("model.norm.weight").float()


class Corpus:
    """Rows of tokens, split in training rows and the last 5 % held out."""

    def __init__(self, path: Path) -> None:
        data = load_file(path)
        self.tokens, self.offsets = data["tokens"].long(), data["offsets"]
        self.prompt_lengths, self.mode = data["prompt_lengths"].long(), data["mode"]
        self.training_rows = int((len(self.offsets) - 1) * 0.95)
        self.rows = len(self.offsets) - 1

    def row(self, i: int) -> torch.Tensor:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def batch(self, rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [B, L] (0-padded), lengths [B], prompt lengths [B]."""
        parts = [self.row(i) for i in rows]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(p) for p in parts])
        return ids.to(device), lengths.to(device), self.prompt_lengths[rows].to(device)


def canvases(
    ids: torch.Tensor, anchors: torch.Tensor, gamma: int, reveal: torch.Tensor, window: int, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean rows [B, L] followed by N canvases of gamma tokens: ids, positions [B, L + N gamma] and the attention mask."""
    B, L = ids.shape
    N = anchors.shape[1]
    device = ids.device
    slot = anchors[..., None] + 1 + torch.arange(gamma, device=device)  # [B, N, gamma], absolute positions
    true = ids.gather(1, slot.clamp(max=L - 1).flatten(1)).view(B, N, gamma)
    hidden = torch.arange(gamma, device=device) >= reveal[..., None]
    canvas = torch.where(hidden, mask_id, true).flatten(1)
    positions = torch.cat([torch.arange(L, device=device).expand(B, L), slot.flatten(1)], 1)
    last = torch.cat([torch.arange(L, device=device).expand(B, L), anchors.repeat_interleave(gamma, 1)], 1)  # newest clean token seen
    block = torch.cat([torch.full((L,), -1, device=device), torch.arange(N, device=device).repeat_interleave(gamma)])
    key = torch.arange(L, device=device)
    clean = (key <= last[..., None]) & (key > last[..., None] - window)
    own = ((block[:, None] == block[None, L:]) & (block[:, None] >= 0)).expand(B, -1, -1)
    return torch.cat([ids, canvas], 1), positions, torch.cat([clean, own], -1)[:, None]


def pick_anchors(lengths: torch.Tensor, prompts: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """[B, N] anchors, nine in ten of them in the answer (where drafting happens), at least one token before the end."""
    u = torch.rand(len(lengths), count, generator=generator).to(lengths.device)
    everywhere = torch.rand(len(lengths), count, generator=generator).to(lengths.device) < 0.1
    first = torch.where(everywhere, 0, (prompts - 1)[:, None])
    return (first + u * (lengths[:, None] - 1 - first)).long()


def loss_and_hits(
    model: SEDD,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    anchors: torch.Tensor,
    gamma: int,
    reveal: torch.Tensor,
    decay: float,
    auxiliary: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy, and top-1 hits and validity [B, N, gamma]."""
    window = model.config.context_window or ids.shape[1]
    x, positions, mask = canvases(ids, anchors, gamma, reveal, window, model.config.tokens)
    B, L = ids.shape
    N = anchors.shape[1]
    states = model.hidden(x, torch.zeros(B, device=ids.device), mask=mask, positions=positions)
    h = states[:, L:]
    slot = positions[:, L:]
    truth = x.new_full((), IGNORE) + torch.zeros_like(slot)
    inside = slot < lengths[:, None]
    truth = torch.where(inside, ids.gather(1, slot.clamp(max=L - 1)), truth)
    column = model.column_of[truth.clamp(min=0)]  # word -> draft vocabulary column, -1 outside
    step = torch.arange(gamma, device=ids.device).expand(B, N, gamma).flatten(1)
    hidden = step >= reveal.repeat_interleave(gamma, 1)
    valid = inside & hidden
    chosen = valid & (column >= 0)
    logits = model.logits(h[chosen])
    ce = F.cross_entropy(logits, column[chosen], reduction="none")
    weight = decay ** (step - reveal.repeat_interleave(gamma, 1))[chosen].float()
    hits = torch.zeros_like(valid)
    hits[chosen] = logits.detach().argmax(-1) == column[chosen]
    loss = (ce * weight).sum() / weight.sum()
    if auxiliary:  # clean positions foretell their successor: it builds the features that canvases then read, almost for free
        following = column[:, :0].new_full((B, L), -1)
        following[:, :-1] = model.column_of[ids[:, 1:]]
        following[torch.arange(L, device=ids.device) >= lengths[:, None] - 1] = -1
        known = following >= 0
        loss = loss + auxiliary * F.cross_entropy(model.logits(states[:, :L][known]), following[known])
    return loss, hits.view(B, N, gamma), valid.view(B, N, gamma)


@torch.no_grad()
def evaluate(model: SEDD, corpus: Corpus, device: torch.device, gamma: int = 8) -> dict[str, object]:
    """Held-out loss, top-1 hits by position, and the tau a greedy draft would have on the rows decoded greedily."""
    model.eval()
    g = torch.Generator().manual_seed(0)
    total, hits, valid, taus, n = 0.0, torch.zeros(gamma), torch.zeros(gamma), {0: [], 1: [], 2: []}, 0
    for start in range(corpus.training_rows, corpus.rows, 4):
        rows = list(range(start, min(start + 4, corpus.rows)))
        ids, lengths, prompts = corpus.batch(rows, device)
        anchors = pick_anchors(lengths, prompts, 24, g)
        loss, hit, ok = loss_and_hits(model, ids, lengths, anchors, gamma, torch.zeros_like(anchors), 1.0)
        total, n = total + loss.item(), n + 1
        hits, valid = hits + (hit & ok).sum((0, 1)).cpu(), valid + ok.sum((0, 1)).cpu()
        run = 1 + (hit & ok).long().cumprod(-1).sum(-1).float().mean(-1)
        for i, row in enumerate(rows):
            taus[int(corpus.mode[row])].append(run[i].item())
    model.train()
    names = {0: "tau_greedy", 1: "tau_0.7", 2: "tau_1"}
    mean = {names[k]: round(sum(v) / len(v), 4) for k, v in taus.items() if v}
    return {"loss": round(total / n, 4), "top1": [round(v, 3) for v in (hits / valid).tolist()], **mean}


def unigram_shift(head: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The state [H] whose read-out is nearest to the corpus's word frequencies: training need not spend steps on those."""
    shift = torch.zeros(head.shape[1], requires_grad=True)
    frequency = counts.float() / counts.sum()
    optimizer = torch.optim.LBFGS([shift], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -(frequency * torch.log_softmax(head @ shift, -1)).sum() + 1e-4 * shift.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return shift.detach()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, required=True, help="the target as a safetensors folder")
    p.add_argument("--name", nargs="+", default=["smollm2-135m", "smollm2-135m-hub"], help="model specs this drafter is for")
    p.add_argument("--data", type=Path, required=True, help="tokens, offsets, prompt_lengths, mode in one safetensors file")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=100, help="training time in all, over every resumption")
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--draft-vocab", type=int, default=8192)
    p.add_argument("--window", type=int, default=128)
    p.add_argument("--rows", type=int, default=3, help="conversations per step")
    p.add_argument("--canvas-tokens", type=int, default=512, help="canvas positions per conversation")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--decay", type=float, default=0.85, help="loss weight per further draft position")
    p.add_argument("--revealed", type=float, default=0.15, help="share of canvases with a revealed first part")
    p.add_argument("--auxiliary", type=float, default=0.5, help="first weight of the clean positions' next-token loss; falls to 0")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = Corpus(a.data)
    embedding, norm = target_tensors(a.target)
    words, width = embedding.shape
    config = SEDDConfig(
        tokens=words, hidden_size=width, n_blocks=a.blocks, n_heads=width // 64, cond_dim=128, dropout=a.dropout, borrow_embeddings=True,
        draft_vocab_size=a.draft_vocab, attention="causal-context", context_window=a.window, time_conditioning=False, scale_by_sigma=False,
    )  # fmt: skip
    model = SEDD(config)
    seen = corpus.tokens[: corpus.offsets[corpus.training_rows]]
    model.draft_vocab.copy_(torch.bincount(seen, minlength=words).topk(a.draft_vocab).indices.sort().values)
    model.borrow(embedding, embedding)
    with torch.no_grad():
        model.output_layer.norm_final.weight.copy_(0.1 * norm)
        model.vocab_embed.mask_embedding.normal_(std=embedding.std().item())
        for block in model.blocks:  # open gates: from the authors' zeros, a short run spends its budget learning to open them
            gates = block.adaLN_modulation.bias.view(6, width)
            gates[2], gates[5] = 1.0, 1.0
        model.output_layer.adaLN_modulation.bias[:width] = unigram_shift(
            model.head, torch.bincount(seen, minlength=words)[model.draft_vocab]
        )
    model.to(device)
    column = torch.full((words,), -1, device=device)
    column[model.draft_vocab] = torch.arange(a.draft_vocab, device=device)
    model.column_of = column
    decayed = [q for q in model.parameters() if q.dim() > 1]
    plain = [q for q in model.parameters() if q.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=a.lr, betas=(0.9, 0.98)
    )
    step, spent = 0, 0.0
    a.out.mkdir(parents=True, exist_ok=True)
    state = a.out / "training.safetensors"
    if state.exists():
        saved = load_file(state)
        step, spent = int(saved.pop("step")), float(saved.pop("spent"))
        model.load_state_dict({k[2:]: v for k, v in saved.items() if k.startswith("m.")})
        for i, q in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            optimizer.state[q] = {
                "step": torch.tensor(float(step)),
                "exp_avg": saved[f"o.{i}.a"].to(device),
                "exp_avg_sq": saved[f"o.{i}.b"].to(device),
            }
        print(f"resumed at step {step}, {spent / 60:.1f} min", flush=True)

    def checkpoint() -> None:
        tensors = {
            "step": torch.tensor(step),
            "spent": torch.tensor(spent, dtype=torch.float64),
            **{f"m.{k}": v.cpu() for k, v in model.state_dict().items()},
        }
        for i, q in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            tensors |= {f"o.{i}.a": optimizer.state[q]["exp_avg"].cpu(), f"o.{i}.b": optimizer.state[q]["exp_avg_sq"].cpu()}
        save_file(tensors, a.out / ".training.partial")
        (a.out / ".training.partial").replace(state)
        model.save_pretrained(a.out / "drafter", torch.bfloat16, draft_len=4, targets=a.name)

    model.train()
    seconds = a.minutes * 60
    running, last_eval, last_save = None, spent, spent
    while spent < seconds:
        began = time.monotonic()
        g = torch.Generator().manual_seed(a.seed * 1_000_003 + step)  # a resumed run draws what the first would have drawn
        rows = torch.randint(corpus.training_rows, (a.rows,), generator=g).tolist()
        ids, lengths, prompts = corpus.batch(rows, device)
        gamma = (2, 4, 4, 8)[int(torch.randint(4, (1,), generator=g))]
        anchors = pick_anchors(lengths, prompts, a.canvas_tokens // gamma, g)
        partly = torch.rand(anchors.shape, generator=g) < a.revealed
        reveal = (torch.randint(1, gamma // 2 + 1, anchors.shape, generator=g) * partly).to(device)
        for group in optimizer.param_groups:
            done = spent / seconds
            group["lr"] = a.lr * min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()))
        loss, _, _ = loss_and_hits(model, ids, lengths, anchors, gamma, reveal, a.decay, a.auxiliary * (1 - spent / seconds))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        spent += min(time.monotonic() - began, 30.0)  # a paused process is not training time
        if step % 50 == 0:
            print(f"step {step}  {spent / 60:.1f} min  loss {running:.3f}  {spent / step:.2f} s/step", flush=True)
        if spent - last_eval > 600 or spent >= seconds:
            last_eval = spent
            result = {"step": step, "minutes": round(spent / 60, 1), "train_loss": round(running, 3), **evaluate(model, corpus, device)}
            print(json.dumps(result), flush=True)
            with (a.out / "curve.jsonl").open("a") as f:
                f.write(json.dumps(result) + "\n")
        if spent - last_save > 300 or spent >= seconds:
            last_save = spent
            checkpoint()


if __name__ == "__main__":
    main()
