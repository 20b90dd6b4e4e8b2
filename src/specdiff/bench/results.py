"""results.json and results.csv: a fold over the journal.

results.json, schema 1. Seconds, bytes, tokens per second. A *spread* is {"median", "min", "max"}; null stands for what was not, or
cannot be, measured.

    schema 1 · status "complete" | "partial" · suite · command · settings {flag: value} · seconds (spent measuring)
    environment {specdiff, torch, transformers, python, platform, cpu, cores, threads, device, device_name, dtype, commit, date}
    parts [part]: one, or in the suite `paper` one for each target and data set
    paper null | {"table2": [row], "appendix_a": [row], "notes": [text]}: see paper.py

part    name · model · dataset|null · notes [text] · missing null | why this part did not run and how to get what it lacks
        prompts [{id, task, tokens}] · max_tokens · dtype
        baselines [{name, kind, spec, status "ok" | "missing" | "failed", why}]: missing is no fault (this target has no such thing)
        tuning [{baseline, temperature, grid [{draft_len, steps, tokens_per_second}], best {draft_len, steps}}]
        cells [cell] · costs {target [{context, n, seconds spread}], draft [{baseline, steps, context, draft_len, seconds spread}]}
        conditional [{baseline, draft_len, steps, temperature, verifier, positions [{reached, accepted, acceptance, overlap}]}]:
            accepted given reached beside the mean of 1 - TV(p, q) over the same reached rows
        batches [{baseline, temperature, sizes [{batch, tokens_per_second, vanilla_tokens_per_second}], break_even}]: the first size at
            which drafting no longer pays against ours-vanilla; null: it pays at every size measured
        divergences [{baseline, draft_len, prompt, position, tokens [cell's, reference's], top2_gap, near_tie, stage, batch}]: at
            temperature 0; gap of the target's two largest logits there, as transformers computes them
        outputs [{prompt, task, baseline, draft_len, temperature, text, pieces [[text, from the draft?]]}]: real answers, cut into
            runs of accepted tokens and of the target's own

cell    stage "main" | "sweep" | "batch" · baseline · draft_len int | "auto" | null · steps int | null · verifier · temperature · batch
        status "ok" | "failed" · why null | text · turns · tokens
        tokens_per_second spread · decode_tokens_per_second spread (after the first emission) · ttft spread · tpot spread
        speedup_vs_hf, speedup_vs_vanilla, decode_speedup_vs_hf, decode_speedup_vs_vanilla {ratio, min, max, turns} | null: ratio of the
            two medians over the turns both ran in; min and max of the turns' own ratios
        tau · tau_before_loop (before the first repeated 8-gram) · alpha · accepted_per_draft · per_position [given reached] · reached [n]
        rounds · plain_rounds · break_even_tau · free_limit (tau T(1) / T(K+1), scoring passes of these turns) · free_fraction
        seconds {prefill, draft, score, verify, commit, host, total}: host is what the stages leave of the total; on a GPU, host seconds
        memory {kind "rss" | "cuda", peak, growth}: high-water mark of the *process* while the cell ran (it holds every baseline's
            weights), and how far that lay above the level before; the largest of its runs
        joules_per_token null | number · exact null | share of temperature-0 answers equal to the reference's
        tasks {task: {turns, tokens_per_second, tau, speedup_vs_hf, speedup_vs_vanilla}}

results.csv has one line a cell, spreads flattened to name, name_min, name_max.
"""

SCHEMA = 1
