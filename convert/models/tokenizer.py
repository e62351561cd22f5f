"""Loading a teacher's tokenizer."""

from transformers import AutoTokenizer, TokenizersBackend

from convert.core.errors import UserError
from convert.models.catalog import Source
from convert.models.failures import first_line


def load_tokenizer(source: Source, vocab_size: int, trust: bool, local: bool) -> TokenizersBackend:
    """The fast tokenizer of a teacher with `vocab_size` embeddings, with a pad token, padding on the left. `trust` runs
    code that comes with it; `local` leaves the network alone. Raises UserError where it does not fit the model."""
    if source.gguf:
        tokenizer = AutoTokenizer.from_pretrained(source.gguf.parent, gguf_file=str(source.gguf))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.where, trust_remote_code=trust, local_files_only=local)
        except ValueError as error:
            raise UserError(
                f"{source.where} has no readable tokenizer ({first_line(error)}). Put its tokenizer.json there."
            ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"A teacher needs a fast tokenizer (tokenizer.json); that of {source.where} is a"
            f" {type(tokenizer).__name__}."
        )
    # transformers makes up a tokenizer of special tokens for some families where there is none
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{source.where} has no tokenizer, or one without words. Put its tokenizer.json there.")
    # ids may be larger than their number: a trimmed vocabulary keeps those it had
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UserError(
            f"A teacher's tokenizer must fit its embedding; that of {source.where} has ids up to {largest} for"
            f" {vocab_size} rows. Take the tokenizer that the model was trained with."
        )
    tokenizer.decode(tokenizer("some words")["input_ids"])  # a damaged tokenizer fails here, where its source is known
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"A teacher's tokenizer must have an end-of-text token; name that of {source.where} in"
            " tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer
