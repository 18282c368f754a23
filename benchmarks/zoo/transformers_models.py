"""Architectures of Transformers, two layers of each, from small configurations."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.zoo.models import Specimen

_WORDS = 100
_SMALL: dict[str, Any] = {
    "vocab_size": _WORDS,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
_EXPERTS = {"experts": "eager", "moe_intermediate_size": 40, "num_experts_per_tok": 2}
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "decoder_start_token_id": 2,
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 10}
_UNNAMED: dict[str, Any] = dict.fromkeys(_SMALL)  # for those that call the like otherwise
_STAGES: dict[str, Any] = {
    **_UNNAMED,
    "image_size": 64,
    "num_labels": 10,
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [16, 24, 32, 48],
}
_WINDOWS: dict[str, Any] = {
    **_UNNAMED,
    "image_size": 32,
    "num_labels": 10,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
}
_SOUND: dict[str, Any] = {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
}


def _text(head: str, kind: str, **options: Any) -> Callable[[], Specimen]:
    """A model of words, called with their numbers."""
    return lambda: Specimen(_made(head, kind, options), _ids(2, 12), (_ids(3, 12),), (_ids(2, 9),))


def _masked(kind: str, **options: Any) -> Callable[[], Specimen]:
    return _text("AutoModelForMaskedLM", kind, **options)


def _causal(kind: str, **options: Any) -> Callable[[], Specimen]:
    return _text("AutoModelForCausalLM", kind, **options)


def _classes(kind: str, **options: Any) -> Callable[[], Specimen]:
    return _text("AutoModelForSequenceClassification", kind, **options)


def _pairs(kind: str, **options: Any) -> Callable[[], Specimen]:
    """Sentences, and the beginning of what they become."""

    def example(batch: int, length: int) -> dict[str, Tensor]:
        return _ids(batch, length) | {"decoder_input_ids": _ids(batch, length - 3)["input_ids"]}

    return lambda: Specimen(
        _made("AutoModelForSeq2SeqLM", kind, _ENCODER_DECODER | options),
        example(2, 12),
        (example(3, 12), example(2, 9)),
    )


def _images(
    kind: str,
    *,
    side: int = 32,
    other: int | None = None,
    head: str = "AutoModelForImageClassification",
    **options: Any,
) -> Callable[[], Specimen]:
    def example(batch: int, size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.rand(batch, 3, size, size)}

    sizes = (example(2, other),) if other else ()
    return lambda: Specimen(_made(head, kind, options), example(2, side), (example(3, side),), sizes)


def _sound(head: str, kind: str, **options: Any) -> Callable[[], Specimen]:
    def example(batch: int, length: int) -> dict[str, Tensor]:
        return {"input_values": torch.randn(batch, length)}

    return lambda: Specimen(_made(head, kind, _SOUND | options), example(2, 600), (example(3, 600), example(2, 800)))


def _segformer() -> Specimen:
    options = {"num_labels": 5, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48], "decoder_hidden_size": 32}
    heads = {"num_attention_heads": [1, 2, 2, 4]}
    model = _made("AutoModelForSemanticSegmentation", "segformer", options | heads)
    first, second, larger = ({"pixel_values": torch.rand(b, 3, s, s)} for b, s in ((2, 64), (3, 64), (2, 96)))
    return Specimen(model, first, (second,), (larger,))


def _clip(kind: str) -> Callable[[], Specimen]:
    """Words and images, each with a model of its own."""
    text = {key: value for key, value in _SMALL.items() if key != "use_cache"}
    seen = {**_IMAGE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
    options = {"text_config": text, "vision_config": seen, "projection_dim": 24}

    def example(batch: int) -> dict[str, Tensor]:
        ids = _ids(batch, 12)
        ids["input_ids"][:, -1] = 2
        return ids | {"pixel_values": torch.rand(batch, 3, 32, 32)}

    def build() -> Specimen:
        config = transformers.AutoConfig.for_model(kind, **options)
        return Specimen(transformers.AutoModel.from_config(config), example(2), (example(3),))

    return build


def _whisper() -> Specimen:
    options = _ENCODER_DECODER | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20}
    model = _made("AutoModelForSpeechSeq2Seq", "whisper", options)
    first, second = (
        {"input_features": torch.randn(b, 16, 40), "decoder_input_ids": _ids(b, 9)["input_ids"]} for b in (2, 3)
    )
    return Specimen(model, first, (second,))


def _made(head: str, kind: str, options: dict[str, Any]) -> Any:
    """A model of this kind with this head. `attention`, `experts`: how these are computed, where not as usual.

    Options that are None are left to the configuration.
    """
    options = {name: value for name, value in (_SMALL | options).items() if value is not None}
    attention, experts = options.pop("attention", None), options.pop("experts", None)
    config = transformers.AutoConfig.for_model(kind, **options)
    if attention:
        config._attn_implementation = attention
    if experts:
        config._experts_implementation = experts
    kinds = getattr(transformers, head)
    return kinds.from_config(config) if head.startswith("Auto") else kinds(config)


def _ids(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _WORDS, (batch, length))}


_BUILDERS: dict[str, Callable[[], Specimen]] = {
    # encoders of text
    "bert": _masked("bert"),
    "bert-classes": _classes("bert"),
    "bert-eager": _masked("bert", attention="eager"),
    "roberta": _masked("roberta"),
    "distilbert": _masked("distilbert", dim=48, n_layers=2, n_heads=4, hidden_dim=80),
    "albert": _masked("albert", embedding_size=24),
    "electra": _masked("electra", embedding_size=24),
    "deberta": _masked("deberta", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "deberta-v2": _masked("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mpnet": _masked("mpnet"),
    "xlm-roberta-classes": _classes("xlm-roberta"),
    "convbert": _masked("convbert", embedding_size=48),
    "squeezebert": _masked("squeezebert", embedding_size=48),
    "roformer": _masked("roformer", embedding_size=48),
    "fnet": _masked("fnet"),
    "funnel": _masked(
        "funnel", num_hidden_layers=None, d_model=48, n_head=4, d_head=12, d_inner=80, block_sizes=[1, 1]
    ),
    "mobilebert": _masked("mobilebert", embedding_size=24, intra_bottleneck_size=24),
    "modernbert": _masked("modernbert", local_attention=8),
    "xlnet-classes": _classes("xlnet", max_position_embeddings=None, d_model=48, n_layer=2, n_head=4, d_inner=80),
    "nystromformer": _masked("nystromformer", num_landmarks=4, segment_means_seq_len=12),
    "longformer": _masked("longformer", attention_window=4),
    # decoders of text
    "gpt2": _causal("gpt2", n_inner=80),
    "gpt2-eager": _causal("gpt2", n_inner=80, attention="eager"),
    "gpt-bigcode": _causal("gpt_bigcode", n_inner=80),
    "gpt-neo": _causal("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt-neox": _causal("gpt_neox"),
    "gptj": _causal("gptj", rotary_dim=8, n_inner=80),
    "codegen": _causal("codegen", rotary_dim=8, n_inner=80),
    "opt": _causal("opt", ffn_dim=80, word_embed_proj_dim=48),
    "bloom": _causal("bloom"),
    "llama": _causal("llama", **_GROUPED),
    "llama-eager": _causal("llama", **_GROUPED, attention="eager"),
    "mistral": _causal("mistral", **_GROUPED, sliding_window=8),
    "qwen2": _causal("qwen2", num_key_value_heads=2),
    "qwen3": _causal("qwen3", **_GROUPED),
    "gemma": _causal("gemma", **_GROUPED),
    "gemma2": _causal("gemma2", **_GROUPED, sliding_window=8, query_pre_attn_scalar=12),
    "gemma3": _causal("gemma3_text", **_GROUPED, sliding_window=8, query_pre_attn_scalar=12),
    "phi": _causal("phi"),
    "phi3": _causal("phi3", num_key_value_heads=2),
    "falcon": _causal("falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80),
    "falcon-multiquery": _causal("falcon", multi_query=True, ffn_hidden_size=80),
    "stablelm": _causal("stablelm", partial_rotary_factor=0.5, num_key_value_heads=2),
    "starcoder2": _causal("starcoder2", num_key_value_heads=2),
    "cohere": _causal("cohere", num_key_value_heads=2),
    "olmo2": _causal("olmo2", num_key_value_heads=2),
    "glm4": _causal("glm4", **_GROUPED),
    "smollm3": _causal("smollm3", num_key_value_heads=2),
    "granite": _causal("granite", num_key_value_heads=2),
    "mpt": _causal("mpt", d_model=48, n_heads=4, n_layers=2, expansion_ratio=2),
    "mixtral": _causal("mixtral", num_key_value_heads=2, num_local_experts=4, experts="eager"),
    "qwen2-moe": _causal(
        "qwen2_moe", num_key_value_heads=2, num_experts=4, shared_expert_intermediate_size=56, **_EXPERTS
    ),
    "qwen2-moe-batched": _causal(
        "qwen2_moe", num_key_value_heads=2, num_experts=4, **(_EXPERTS | {"experts": "batched_mm"})
    ),
    "qwen3-moe": _causal("qwen3_moe", **_GROUPED, num_experts=4, **_EXPERTS),
    "olmoe": _causal("olmoe", num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, experts="eager"),
    "deepseek-v3": _causal(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        **_EXPERTS,
    ),
    "mamba": _causal("mamba", state_size=8),
    "mamba2": _causal("mamba2", state_size=8, num_heads=8, head_dim=12, n_groups=2, chunk_size=4),
    "rwkv": _causal("rwkv", attention_hidden_size=48),
    "recurrent-gemma": _causal("recurrent_gemma", num_key_value_heads=1, lru_width=48, attention_window_size=8),
    # encoders and decoders
    "t5": _pairs("t5", d_kv=12, d_ff=80, num_layers=2, num_heads=4),
    "t5-gated": _pairs("t5", d_kv=12, d_ff=80, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
    "bart": _pairs("bart"),
    "mbart": _pairs("mbart"),
    "marian": _pairs("marian"),
    "pegasus": _pairs("pegasus"),
    "m2m-100": _pairs("m2m_100"),
    # images
    "vit": _images("vit", **_IMAGE),
    "deit": _images("deit", head="DeiTForImageClassification", **_IMAGE),
    "beit": _images("beit", **_IMAGE, use_relative_position_bias=True),
    "dinov2": _images("dinov2", **_IMAGE, mlp_ratio=2),
    "siglip-images": _images("siglip", num_labels=10, vision_config={"image_size": 32, "patch_size": 8, **_SMALL}),
    "swin": _images("swin", **_WINDOWS),
    "swinv2": _images("swinv2", **_WINDOWS),
    "convnext": _images("convnext", side=64, other=96, **_STAGES),
    "convnextv2": _images("convnextv2", side=64, other=96, **_STAGES),
    "resnet": _images("resnet", side=64, other=96, **_STAGES, embedding_size=16),
    "mobilevit": _images(
        "mobilevit", side=64, image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32]
    ),
    "poolformer": _images("poolformer", side=64, other=96, **_STAGES),
    "segformer": _segformer,
    "clip": _clip("clip"),
    "siglip": _clip("siglip"),
    # sound
    "whisper": _whisper,
    "wav2vec2": _sound("AutoModelForCTC", "wav2vec2"),
    "wav2vec2-stable": _sound("AutoModelForCTC", "wav2vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "hubert": _sound("AutoModelForCTC", "hubert"),
    "wavlm": _sound("AutoModelForCTC", "wavlm", num_buckets=16, max_bucket_distance=32),
}
FAMILIES = dict.fromkeys(_BUILDERS, "transformers")


def build(name: str) -> Specimen:
    """A small model of an architecture, with random weights."""
    return _BUILDERS[name]()
