"""The command that continues a prompt with a converted model, streamed.

python -m convert.generate runs/neox-nano-mamba2 "def add("
"""

import argparse

from convert.cli import Parser, heavy_imports, main_of, real_number, whole_number
from convert.core.errors import UserError
from convert.models.catalog import resolve

LONGEST = 1_000_000  # tokens of an answer (ours)
COLDEST = 1e-6  # above 0, which is greedy: a division by less leaves float32 (ours)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.generate", description="Continue a prompt with a converted model (or any teacher)."
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=whole_number(1, LONGEST), default=128)
    parser.add_argument(
        "--temperature",
        type=real_number(0, 1000),
        default=0.0,
        help="0: greedy; above: drawn from all tokens at this temperature",
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    parser.add_argument("--raw", action="store_true", help="do not use the chat template of an instruct model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default the best one here")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code, and read pickles, that come with the model"
    )
    return main_of(parser, generate, argv)


def generate(args: argparse.Namespace) -> None:
    """Print the continuation as it is generated."""
    if not args.prompt:
        raise UserError("The prompt must not be empty.")
    if 0 < args.temperature < COLDEST:
        raise UserError(f"--temperature must be 0 or at least {COLDEST:g}; got {args.temperature:g}.")
    source = resolve(args.folder)
    if source.domain == "vision":
        raise UserError(f"Text is written by language models; {args.folder} is an image classifier.")
    with heavy_imports():
        import torch
        from transformers import TextStreamer

        from convert.data.prompts import encode, has_chat_template
        from convert.evaluation import generation
        from convert.models.devices import pick_device
        from convert.models.loading import load_teacher

    loaded = load_teacher(source, device=pick_device(args.device), trust_remote_code=args.trust_remote_code)
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = has_chat_template(tokenizer) and not args.raw
    torch.manual_seed(args.seed)
    generation.generate(
        model,
        tokenizer,
        [encode(tokenizer, args.prompt, chat=chat)],
        args.max_new_tokens,
        choose=generation.drawn(args.temperature) if args.temperature else None,
        streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
    )


if __name__ == "__main__":
    raise SystemExit(main())
