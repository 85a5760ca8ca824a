"""python -m ktd.embedded.train: trains the demo model within a given number of minutes."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ktd.embedded.accuracy import exact_match, held_out_set
from ktd.embedded.architecture import VOCAB_SIZE, new_model
from ktd.embedded.batches import IGNORE, Rows, start_workers
from ktd.embedded.checkpoint import load_checkpoint, save_checkpoint
from ktd.embedded.corpus import Split, draw_dialogue
from ktd.embedded.fast_forward import FastForward
from ktd.embedded.tokenizer import texts_of, train_tokenizer

# Step of the auxiliary-loss-free load balancing (DeepSeek-V3 report, 2.1.2); shrinks with the learning rate.
BIAS_STEP = 0.002


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and trains; progress goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m ktd.embedded.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=8, help="wall-clock time for the training itself")
    parser.add_argument("--rows", type=int, default=64, help="packed rows in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that write dialogues")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json made earlier; default: train one")
    parser.add_argument("--start", type=Path, help="folder with a checkpoint to go on from")
    parser.add_argument("--compile", action="store_true", help="torch.compile where it measures faster")
    parser.add_argument("--measure", type=int, default=500, help="held-out dialogues per task at the end")
    parser.add_argument("--tokenizer-only", action="store_true", help="write tokenizer.json and stop")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    else:
        rng = Random(args.seed)
        dialogues = (draw_dialogue(rng, Split.TRAIN) for _ in range(40_000))
        tokenizer = train_tokenizer((text for d in dialogues for text in texts_of(d)), VOCAB_SIZE)
    tokenizer.save(str(args.out / "tokenizer.json"))
    if not args.tokenizer_only:
        Trainer(args, tokenizer).run()


class Trainer:
    """One training run: model, optimizer, workers and clock."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self._args = args
        self._tokenizer = tokenizer
        self._queue, self._workers = start_workers(
            tokenizer.to_str(), args.workers, args.rows, args.length, args.seed
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        model = load_checkpoint(args.start) if args.start else new_model()
        self._model = FastForward(model.train().to(self._device))
        self._step_fn: Any = self._loss
        decayed = [p for p in model.parameters() if p.ndim > 1]
        other = [p for p in model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
            fused=self._device == "cuda",
        )
        self._gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "experts")]

    def run(self) -> None:
        """Trains until the time is up, then measures and saves."""
        args, model = self._args, self._model.model
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f}M parameters on {self._device}", flush=True)
        if args.compile:
            self._choose_step()
        checks = held_out_set(self._tokenizer, 64)
        begin = reported = time.monotonic()
        checked = begin
        step = tokens = 0
        losses: list[Tensor] = []
        while (share := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
            losses.append(self._step(share))
            step, tokens = step + 1, tokens + args.rows * args.length
            if (now := time.monotonic()) - reported > 10:
                loss = torch.stack(losses).mean().item()
                rate = tokens / (time.monotonic() - begin)
                queue = self._queue.qsize()
                spent = f"{now - begin:5.0f}s step {step} loss {loss:.4f}"
                print(f"{spent} {rate / 1e6:.2f}M tok/s queue {queue}", flush=True)
                losses, reported = [], now
                if now - checked > 90:
                    print("  " + _table(self._measure(checks)), flush=True)
                    save_checkpoint(model, args.out)
                    checked = time.monotonic()
        for worker in self._workers:
            worker.terminate()
        save_checkpoint(model, args.out)
        print(f"trained: {step} steps, {tokens / 1e6:.0f}M tokens; loads {self._imbalance()}", flush=True)
        result = self._measure(held_out_set(self._tokenizer, args.measure))
        print(_table(result), flush=True)
        (args.out / "held-out.json").write_text(
            json.dumps({"steps": step, "tokens": tokens, "exact": result})
        )

    def _step(self, share: float) -> Tensor:
        warm = min(1.0, share / 0.02)
        schedule = warm * 0.5 * (1 + math.cos(math.pi * share))
        for group in self._optimizer.param_groups:
            group["lr"] = self._args.learning_rate * schedule
        loss, loads = self._step_fn(*self._batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._loads = loads.detach()
        with torch.no_grad():
            for gate, load in zip(self._gates, self._loads, strict=True):
                gate.e_score_correction_bias += BIAS_STEP * schedule * torch.sign(load.mean() - load)
        detached: Tensor = loss.detach()
        return detached

    def _loss(
        self, ids: Tensor, targets: Tensor, positions: Tensor, documents: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._device, torch.bfloat16):
            hidden, loads = self._model(ids, positions, documents)
            logits = self._model.model.lm_head(hidden)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return loss, loads

    def _batch(self) -> tuple[Tensor, ...]:
        rows: Rows = self._queue.get()
        arrays = (rows.ids, rows.targets, rows.positions, rows.documents)
        return tuple(torch.from_numpy(a).to(self._device, non_blocking=True).long() for a in arrays)

    def _choose_step(self) -> None:
        """Compiles the loss if that works and measures faster than the plain one."""
        plain = self._time()
        start = time.monotonic()
        self._step_fn = torch.compile(self._loss, dynamic=False)
        try:
            self._time(2)
            spent, compiled = time.monotonic() - start, self._time()
        except Exception as error:  # whatever the compiler stumbles over: training goes on without it
            print(f"torch.compile failed, going on without: {str(error)[:300]}", flush=True)
            self._step_fn = self._loss
            return
        print(f"step: plain {plain:.4f}s, compiled {compiled:.4f}s (after {spent:.0f}s)", flush=True)
        if compiled >= plain:
            self._step_fn = self._loss

    def _time(self, n: int = 8) -> float:
        self._step(0.0)
        if self._device == "cuda":
            torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(n):
            self._step(0.0)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - start) / n

    def _measure(self, sets: Any) -> dict[str, float]:
        return exact_match(self._model, sets, self._device)

    def _imbalance(self) -> str:
        loads = self._loads / self._loads.mean(-1, keepdim=True)
        return ", ".join(f"{load.min():.2f}–{load.max():.2f}" for load in loads)


def _table(result: dict[str, float]) -> str:
    return " ".join(f"{task} {100 * share:.1f}" for task, share in result.items())


if __name__ == "__main__":
    main()
