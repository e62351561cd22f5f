"""Text from a converted model, streamed.

python -m convert.generate runs/neox-nano-mamba2 "def add("
"""

import argparse

from convert.core.errors import UserError, quick_to_stop

with quick_to_stop(__name__ == "__main__"):
    import torch
    from transformers import TextStreamer

    from convert.data.prompts import encode, has_chat_template
    from convert.evaluation import generation
    from convert.models.loading import load_teacher, pick_device
    from convert.run import fail_in_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.generate", description="Continue a prompt with a converted model (or any teacher)."
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy; above: drawn from all tokens at this temperature"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="do not use the chat template of an instruct model")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code, and read pickles, that come with the model"
    )
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    args = parser.parse_args(argv)
    return fail_in_words(lambda: generate(args), args.debug)


LONGEST = 1_000_000  # tokens of an answer (ours)
COLDEST = 1e-6  # above 0, which is greedy: a division by less leaves float32 (ours)


def generate(args: argparse.Namespace) -> None:
    if not args.prompt:
        raise UserError("The prompt must not be empty.")
    for name, value, low, high in (
        ("--max-new-tokens", args.max_new_tokens, 1, LONGEST),
        ("--temperature", args.temperature or COLDEST, COLDEST, 1000),
        ("--seed", args.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} must be within {low:,} .. {high:,}; got {value}.")
    loaded = load_teacher(args.folder, device=pick_device(args.device), trust_remote_code=args.trust_remote_code)
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = has_chat_template(tokenizer) and not args.raw
    prompt = encode(tokenizer, args.prompt, chat=chat)
    torch.manual_seed(args.seed)
    generation.generate(
        model,
        tokenizer,
        [prompt],
        args.max_new_tokens,
        choose=generation.drawn(args.temperature) if args.temperature else None,
        streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
    )


if __name__ == "__main__":
    raise SystemExit(main())
