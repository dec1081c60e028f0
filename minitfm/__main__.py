"""The model as a program: `python -m minitfm train | generate | evaluate`."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minitfm import checkpoint, data, evaluate
from minitfm import train as training
from minitfm.checkpoint import Checkpoint
from minitfm.config import ACTIVATIONS, Config
from minitfm.generate import stream
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer
from minitfm.train import OPTIMIZERS, SCHEDULES, Settings

STATE = "resume.pt"

MODEL_OPTIONS = {
    "dim": "width of the residual stream",
    "hidden_dim": "width of the feed-forward layers",
    "layers": "blocks",
    "heads": "query heads",
    "kv_heads": "key/value heads; 0: as many as query heads",
    "context": "longest sequence that the model accepts",
    "activation": f"of the feed-forward layers: {' or '.join(ACTIVATIONS)}",
}
TRAIN_OPTIONS = {
    "steps": "optimizer steps",
    "batch": "sequences in a step",
    "length": "tokens in a sequence",
    "optimizer": f"for the blocks' matrices: {' or '.join(OPTIMIZERS)}",
    "learning_rate": "peak of AdamW's",
    "muon_learning_rate": "peak of Muon's",
    "warm_up": "share of the steps",
    "schedule": f"after the warm-up: {', '.join(SCHEDULES)}",
    "weight_decay": "of the blocks' matrices",
    "clip": "largest norm of the gradient",
    "seed": "of the initial weights and of the data's order",
    "validate_every": "steps; the best model so far is what --out holds",
    "save_every": "steps between states that --resume can continue",
}


def add_options(parser: argparse.ArgumentParser, defaults: dict, texts: dict[str, str]) -> None:
    """One --option for each named default, of its type."""
    for name, text in texts.items():
        value = defaults[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minitfm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train a model from scratch", formatter_class=formatter)
    generate = commands.add_parser("generate", help="continue a prompt", formatter_class=formatter)
    score = commands.add_parser("evaluate", help="perplexity and bits per byte", formatter_class=formatter)
    for command in (generate, score):
        command.add_argument("--model", type=Path, default=checkpoint.BASE, help=checkpoint.LAYOUT)
    for command in (train, score):
        command.add_argument("--text", type=Path, help="text file or folder; Python's own documentation if not given")
    add_train(train)
    add_generate(generate)
    add_evaluate(score)
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    """What `train` needs to know."""
    parser.set_defaults(run=run_train)
    parser.add_argument("--out", type=Path, default=Path("runs/base"), help="checkpoint folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the run that was interrupted in --out")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the byte-level BPE")
    add_options(parser, asdict(Config(vocab_size=2048)), MODEL_OPTIONS)
    add_options(parser, asdict(Settings(validate_every=250, save_every=250)), TRAIN_OPTIONS)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """What `generate` needs to know."""
    parser.set_defaults(run=run_generate)
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; none: a new document")
    parser.add_argument("--tokens", type=int, default=200, help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this mass together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` needs to know."""
    parser.set_defaults(run=run_evaluate)
    parser.add_argument("--all", action="store_true", help="score the whole text, not only what train holds out")
    parser.add_argument("--window", type=int, default=128, help="tokens that the model sees at a time")
    parser.add_argument("--stride", type=int, help="tokens by which the windows slide; half a window if not given")


def run_train(args: argparse.Namespace) -> None:
    """Train from scratch or resume; --out always holds the best model so far, validated on what is held out."""
    state = args.out / STATE
    if args.resume and not state.exists():
        raise ValueError(f"nothing to resume: there is no {state}")
    if not args.resume and (args.out / "config.json").exists():
        raise ValueError(f"{args.out} already holds a checkpoint: give another --out, or --resume")
    texts, held_out = data.split(data.documents(args.text))
    path = args.out / "tokenizer.json"
    tokenizer = Tokenizer.load(path) if args.resume else Tokenizer.train(texts.values(), args.vocabulary)
    settings = Settings(**{name: getattr(args, name) for name in TRAIN_OPTIONS}, state=state)
    model = new_model(args, tokenizer.vocab_size)
    tokens = data.encode(texts, tokenizer)
    validation = data.sequences(data.encode(held_out, tokenizer), settings.length)
    training.require_fit(model, tokens, settings)
    if not args.resume:
        checkpoint.save(args.out, model, tokenizer)  # an hour's work must not find out at its end that it cannot write
    with Keeper(args.out, tokenizer, model, settings) as keeper:
        training.train(model, tokens, settings, progress=keeper, validation=validation)
    print_scores(checkpoint.load(args.out), held_out, settings.length, None)


def new_model(args: argparse.Namespace, vocab_size: int) -> Transformer:
    """An untrained model of the size asked for, its blocks starting as the identity."""
    torch.manual_seed(args.seed)
    model = Transformer(Config(vocab_size=vocab_size, **{name: getattr(args, name) for name in MODEL_OPTIONS}))
    training.zero_residual_outputs(model)
    return model


class Keeper:
    """Watches a training run: draws its progress, and saves the model whenever the held-out loss is the best so far."""

    def __init__(self, out: Path, tokenizer: Tokenizer, model: Transformer, settings: Settings) -> None:
        self.out, self.tokenizer, self.model = out, tokenizer, model
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("", total=settings.steps)
        self.facts = {
            "command": shlex.join(["python", "-m", "minitfm", *(word for word in sys.argv[1:] if word != "--resume")]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": model.num_parameters(),
        }

    def __enter__(self) -> Keeper:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, now: training.Progress) -> None:
        losses = [loss for _, loss in now.history]
        text = f"loss {now.loss:.3f}" + (f", held out {losses[-1]:.3f}" if losses else "")
        self.bar.update(self.task, completed=now.step, description=text)
        if now.validated and losses[-1] == min(losses):
            info = {**self.facts, "steps": now.step, "seconds": round(now.seconds), "validation": now.history}
            checkpoint.save(self.out, self.model, self.tokenizer, info)


def run_generate(args: argparse.Namespace) -> None:
    """Stream a continuation to stdout until the document ends or --tokens are out."""
    model, tokenizer, _ = checkpoint.load(args.model)
    ids = [tokenizer.begin, *tokenizer.encode(args.prompt)]
    if len(ids) > model.config.context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context is {model.config.context}")
    tokens = min(args.tokens, model.config.context - len(ids))
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in stream(model, torch.tensor([ids]), tokens, **sampling):
        ids.append(int(token))
        if ids[-1] == tokenizer.end:
            break
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the token may end in the middle of a character: wait for its other bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(ids)[len(shown) :])


def run_evaluate(args: argparse.Namespace) -> None:
    """Print perplexity and bits per byte of a model on a text."""
    loaded = checkpoint.load(args.model)
    texts = data.documents(args.text)
    chosen = texts if args.all else data.split(texts)[1]
    print_scores(loaded, chosen, args.window, args.stride)


def print_scores(loaded: Checkpoint, texts: dict[str, str], window: int, stride: int | None) -> None:
    """The two measures and what they were measured on."""
    model, tokenizer, _ = loaded
    tokens = data.encode(texts, tokenizer)
    bits = evaluate.bits_per_byte(model, tokenizer, texts.values(), window, stride)
    print(f"text            {sum(len(text.encode()) for text in texts.values()):,} bytes, {len(tokens):,} tokens")
    print(f"perplexity      {evaluate.perplexity(model, data.sequences(tokens, window)):.3f} per token")
    print(f"                (fixed windows of {window} tokens)")
    print(f"bits per byte   {bits:.4f}")
    print(f"                (windows of {window} tokens, sliding by {stride or window // 2})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on stderr and exit code 2."""
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"minitfm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minitfm: interrupted (train --resume continues a training run)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # gradients below 1e-38 make a CPU ten times as slow, and move no weight
    sys.exit(main())
