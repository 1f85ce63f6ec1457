"""Configuration of an exported model (`evals/export.py`): read by modeling_nca.py, beside it."""

from transformers import PreTrainedConfig


class NCAConfig(PreTrainedConfig):
    """What an exported GPT computes, resolved block by block: nothing is derived at load time.

    vocab_size: tokens, without the trainer's padding. eos_token_id (bos and pad too) opens every
        document in the training text, and wherever it stands in `input_ids` a new document starts.
    max_position_embeddings: length of a training row, tokens; a limit where positions are learned.
    family: "speedrun" (RMS norm, relu^2) or "gpt2" (LayerNorm, GELU, learned positions, an fp32
        residual stream, a tied head).
    windows: the [long, short] attention windows in use, tokens; trained_windows: those of the last
        step. Load with `windows=config.trained_windows` to compute what was trained, exactly.
    blocks: for each {"mlp": width, "attention": None or a dict}, the latter with
        arm: "softmax", "paired", "diff_v1", "diff_v2" or "selective"; heads: of the output
        query_heads, key_heads, value_heads, key_dim, value_dim: shapes of q, k and v
        scale: factor on q.k; window: 0 for the long one, 1 for the short
        second_window: a cap on the second map's window, tokens, or None
        value_table: index of the value embedding that is mixed into v, or None
        lambda_init: diff_v1's constant
        key_offset: whether half of a key is the token before's
        selectors: 1 where the scores of head 0 mask earlier tokens for all heads, or 0.
    rotary: "half" of each head (base 1024), "full" (base 10,000) or None.
    softcap: c of c sigmoid(4 z / c), [top, shift, width] of top sigmoid((z + shift) / width), or 0.
    qk_norm, gate, xsa, bias, x0, skip, backout, smear, value_gate: as train_gpt.py --help has them.
    value_tables: their widths.
    ngram: rows of the table for pairs and triples of tokens, or 0; ngram_dtype: their dtype, which
        stays whatever the other weights are loaded as.
    copy_band: the last tokens of a document, the present one among them, that the copy head points
        to; 0 where there is none.
    """

    model_type = "nca_gpt"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        *,
        vocab_size=50257,
        hidden_size=768,
        num_attention_heads=6,
        max_position_embeddings=16384,
        family="speedrun",
        windows=(2560, 1280),
        trained_windows=(1792, 896),
        blocks=(),
        rotary="half",
        qk_norm=True,
        gate=True,
        xsa=False,
        bias=False,
        x0=True,
        skip=(),
        backout=-1,
        softcap=30.0,
        smear=False,
        value_gate=False,
        value_tables=(),
        ngram=0,
        ngram_dtype="bfloat16",
        copy_band=0,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
        tie_word_embeddings=False,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_attention_heads, self.num_hidden_layers = num_attention_heads, len(blocks)
        self.max_position_embeddings = max_position_embeddings
        self.family, self.rotary = family, rotary
        self.windows, self.trained_windows = list(windows), list(trained_windows)
        self.blocks, self.value_tables = list(blocks), list(value_tables)
        self.qk_norm, self.gate, self.xsa, self.bias = qk_norm, gate, xsa, bias
        self.x0, self.skip, self.backout, self.softcap = x0, list(skip), backout, softcap
        self.smear, self.value_gate = smear, value_gate
        self.ngram, self.ngram_dtype, self.copy_band = ngram, ngram_dtype, copy_band
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id, self.use_cache = pad_token_id, use_cache
        self.tie_word_embeddings = tie_word_embeddings
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**kwargs)
