"""Text from a converted model, streamed.

python -m convert.generate runs/neox-nano-mamba2 "def add("
"""

import argparse

from convert.errors import UserError, quick_to_stop

with quick_to_stop(__name__ == "__main__"):
    import torch
    from transformers import TextStreamer

    from convert.readings import chat_text
    from convert.run import fail_in_words
    from convert.teachers import load_teacher, pick_device


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.generate", description="Continue a prompt with a converted model (or any teacher)."
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="do not use the chat template of an instruct model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code, and read pickles, that come with the model")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    args = parser.parse_args(argv)
    return fail_in_words(lambda: generate(args), args.debug)


def generate(args: argparse.Namespace) -> None:
    if not args.prompt:
        raise UserError("The prompt must not be empty.")
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UserError(
            f"--max-new-tokens must be at least 1 and --temperature at least 0; got {args.max_new_tokens} and {args.temperature}."
        )
    loaded = load_teacher(args.folder, device=pick_device(args.device), trust_remote_code=args.trust_remote_code)
    tokenizer, text = loaded.tokenizer, args.prompt
    chat = tokenizer.chat_template is not None and not args.raw
    if chat:
        text = chat_text(tokenizer, args.prompt)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(loaded.model.device)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    loaded.model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True), **sampling,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
