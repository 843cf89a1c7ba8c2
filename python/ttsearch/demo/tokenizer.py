"""The demo tokenizer: one token a character, except the step separator and the opening of the answer."""

from .task import LETTERS, STEP_SEPARATOR

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BOX = "\\boxed{"
VOCABULARY = [PAD, EOS, UNKNOWN, STEP_SEPARATOR, BOX, *"}0123456789+-*=:;?", *LETTERS]
PAD_ID, EOS_ID, SEPARATOR_ID = (VOCABULARY.index(token) for token in (PAD, EOS, STEP_SEPARATOR))


def build_tokenizer():
    """A transformers fast tokenizer; adds no token of its own, so encode and decode are exact inverses."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    pieces = Regex(r"\n\n|\\boxed\{|[\s\S]")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="right",
    )
