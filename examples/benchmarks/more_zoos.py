"""Further models for the coverage table (see ``zoo.py``): small configurations, and inputs of their kinds."""

# ruff: noqa: E501  (tables)
from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any]


def image(size: int, channels: int = 3) -> Tensor:
    return torch.rand(1, channels, size, size)


def ids(*names: str, length: int = 12) -> dict[str, Tensor]:
    return {name: torch.randint(3, 90, (2, length)) for name in names or ("input_ids",)}


# -- segmentation_models_pytorch ---------------------------------------------------------------------

SEGMENTATION = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
                "UPerNet", "Segformer", "DPT")  # fmt: skip


def segmentation_make(name: str) -> Made:
    import segmentation_models_pytorch as smp

    if name == "DPT":
        return smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None).eval(), image(224)
    return getattr(smp, name)("resnet18", encoder_weights=None).eval(), image(128 if name == "PAN" else 64)


# -- MONAI -------------------------------------------------------------------------------------------

MONAI: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "UNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2),
              "num_res_units": 1}, (1, 32, 32, 32)),
    "BasicUNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (8, 8, 16, 16, 32, 8)},
                  (1, 32, 32, 32)),
    "DynUNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3],
                 "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]}, (1, 32, 32, 32)),
    "SegResNet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8}, (1, 32, 32, 32)),
    "UNETR": ({"in_channels": 1, "out_channels": 2, "img_size": 32, "hidden_size": 48, "mlp_dim": 96,
               "num_heads": 4, "feature_size": 8}, (1, 32, 32, 32)),
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12}, (1, 64, 32, 32)),
    "VNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, (1, 64, 64)),
    "AttentionUnet": ({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32),
                       "strides": (2, 2)}, (1, 32, 32, 32)),
}  # fmt: skip


def monai_make(name: str) -> Made:
    networks = importlib.import_module("monai.networks.nets")
    options, shape = MONAI[name]
    return getattr(networks, name)(**options).eval(), torch.rand(1, *shape)


# -- torch_geometric ---------------------------------------------------------------------------------

GRAPHS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN", "TAG", "SGConv", "Transformer", "GraphConv",
          "Cheb", "ARMA")  # fmt: skip


class Layers(nn.Module):
    """Two graph convolutions with an activation between them."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(8, 32), make(32, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x, edge_index).relu(), edge_index)
        return out


def graph_make(name: str) -> Made:
    from torch_geometric import nn as geometric
    from torch_geometric.nn import models

    inputs = {"x": torch.randn(12, 8), "edge_index": torch.randint(0, 12, (2, 30))}
    layers: dict[str, Callable[[int, int], nn.Module]] = {
        "TAG": geometric.TAGConv,
        "SGConv": geometric.SGConv,
        "Transformer": geometric.TransformerConv,
        "GraphConv": geometric.GraphConv,
        "Cheb": lambda a, b: geometric.ChebConv(a, b, K=2),
        "ARMA": geometric.ARMAConv,
    }
    if name in layers:
        return Layers(layers[name]).eval(), inputs
    more: dict[str, Any] = {}
    if name == "PNA":
        more = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 2, 4, 3])}
    return getattr(models, name)(8, 32, 2, 3, **more).eval(), inputs


# -- vit-pytorch and x-transformers, which are written with einops ------------------------------------

VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit", {}),
    "SimpleViT": ("simple_vit", {}),
    "DeepViT": ("deepvit", {}),
    "CaiT": ("cait", {"cls_depth": 1}),
    "T2TViT": ("t2t", {}),
    "CvT": ("cvt", {}),
    "PiT": ("pit", {}),
    "LeViT": ("levit", {}),
    "CrossFormer": ("crossformer", {}),
    "MaxViT": ("max_vit", {}),
    "RegionViT": ("regionvit", {}),
    "MobileViT": ("mobile_vit", {}),
}
XFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True},
    "glu": {"ff_glu": True, "use_rmsnorm": True},
    "one key head": {"attn_one_kv_head": True},
    "qk norm": {"attn_qk_norm": True},
    "relative": {"rel_pos_bias": True},
}


def vit_make(name: str) -> Made:
    small = {
        "image_size": 32,
        "patch_size": 8,
        "num_classes": 10,
        "dim": 64,
        "depth": 2,
        "heads": 4,
        "mlp_dim": 128,
    }
    own: dict[str, dict[str, Any]] = {
        "T2TViT": {"dim": 64, "image_size": 32, "depth": 2, "heads": 4, "mlp_dim": 128, "num_classes": 10},
        "CvT": {"num_classes": 10},
        "PiT": {"image_size": 32, "patch_size": 4, "dim": 64, "num_classes": 10, "depth": (1, 1), "heads": 2,
                "mlp_dim": 128},
        "LeViT": {"image_size": 64, "num_classes": 10, "dim": (32, 48, 64), "depth": 1, "heads": (2, 3, 4),
                  "mlp_mult": 2},
        "CrossFormer": {"num_classes": 10, "dim": (32, 64, 64, 64), "depth": (1, 1, 1, 1)},
        "MaxViT": {"num_classes": 10, "dim": 32, "depth": (1, 1), "dim_conv_stem": 16, "dim_head": 16,
                   "window_size": 4},
        "RegionViT": {"dim": (16, 32, 64, 64), "depth": (1, 1, 1, 1), "num_classes": 10},
        "MobileViT": {"image_size": (64, 64), "dims": [32, 40, 48], "num_classes": 10,
                      "channels": [8, 16, 24, 24, 32, 32, 40, 40, 48, 48, 96]},
    }  # fmt: skip
    sizes = {"LeViT": 64, "CrossFormer": 224, "MaxViT": 64, "RegionViT": 224, "MobileViT": 64, "CvT": 64}
    module, more = VITS[name]
    kind = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
    return kind(**own.get(name, {**small, **more})).eval(), image(sizes.get(name, 32))


def xformer_make(name: str) -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **XFORMERS[name])
    model = TransformerWrapper(num_tokens=99, max_seq_len=64, attn_layers=layers)
    return model.eval(), torch.randint(0, 99, (2, 12))


# -- diffusers ---------------------------------------------------------------------------------------

DIFFUSERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "unet2d": (
        "UNet2DModel",
        {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": image(16), "timestep": torch.tensor([3])},
    ),
    "autoencoder_kl": (
        "AutoencoderKL",
        {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 8},
        lambda: {"sample": image(32)},
    ),
    "vq": (
        "VQModel",
        {"block_out_channels": (32,), "latent_channels": 3, "norm_num_groups": 8, "num_vq_embeddings": 16},
        lambda: {"sample": image(16)},
    ),
    "autoencoder_tiny": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        lambda: {"sample": image(32)},
    ),
    "transformer2d": (
        "Transformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "norm_num_groups": 8,
         "cross_attention_dim": 32},
        lambda: {"hidden_states": image(8, 32), "encoder_hidden_states": torch.randn(1, 6, 32)},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
         "cross_attention_dim": 32, "caption_channels": 32, "use_additional_conditions": False},
        lambda: {"hidden_states": image(8, 4), "encoder_hidden_states": torch.randn(1, 6, 32),
                 "timestep": torch.tensor([3])},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4,
         "out_channels": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16,
         "pos_embed_max_size": 16},
        lambda: {"hidden_states": image(16, 4), "encoder_hidden_states": torch.randn(1, 6, 32),
                 "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([3])},
    ),
    "prior": (
        "PriorTransformer",
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 32,
         "num_embeddings": 7, "additional_embeddings": 4},
        lambda: {"hidden_states": torch.randn(2, 32), "timestep": torch.tensor([2, 2]),
                 "proj_embedding": torch.randn(2, 32), "encoder_hidden_states": torch.randn(2, 7, 32)},
    ),
    "unet1d": (
        "UNet1DModel",
        {"sample_size": 32, "in_channels": 2, "out_channels": 2, "block_out_channels": (16, 32), "extra_in_channels": 32,
         "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"), "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip")},
        lambda: {"sample": torch.randn(1, 2, 64), "timestep": torch.tensor([3])},
    ),
}  # fmt: skip


# -- torchaudio --------------------------------------------------------------------------------------

_STREAM = {"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2}
AUDIO: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "Conformer": ({**_STREAM, "depthwise_conv_kernel_size": 7},
                  lambda: (torch.randn(2, 20, 32), torch.tensor([20, 15]))),
    "ConvTasNet": ({"enc_num_feats": 32, "msk_num_feats": 16, "msk_num_hidden_feats": 32, "msk_num_layers": 2,
                    "msk_num_stacks": 1}, lambda: torch.randn(2, 1, 400)),
    "DeepSpeech": ({"n_feature": 16, "n_hidden": 32, "n_class": 10}, lambda: torch.randn(2, 1, 20, 16)),
    "Emformer": ({**_STREAM, "segment_length": 4, "right_context_length": 2},
                 lambda: (torch.randn(2, 18, 32), torch.tensor([16, 12]))),
    "Wav2Letter": ({"num_classes": 10, "input_type": "mfcc", "num_features": 13}, lambda: torch.randn(2, 13, 64)),
    "WaveRNN": ({"upsample_scales": [2, 2], "n_classes": 8, "hop_length": 4, "n_res_block": 1, "n_rnn": 32,
                 "n_fc": 32, "n_freq": 16, "n_hidden": 32, "n_output": 32},
                lambda: (torch.randn(2, 1, 24), torch.randn(2, 1, 16, 10))),
}  # fmt: skip


def audio_make(name: str) -> Made:
    options, inputs = AUDIO[name]
    return getattr(importlib.import_module("torchaudio.models"), name)(**options).eval(), inputs()


# -- ultralytics -------------------------------------------------------------------------------------

YOLOS = tuple(
    f"{name}{task}"
    for name in ("yolov8n", "yolov10n", "yolo11n", "yolo12n", "rtdetr-l")
    for task in ("", "-seg", "-pose", "-obb", "-cls")
    if not task or name in ("yolov8n", "yolo11n") or (name == "yolo12n" and task != "")
)


def yolo_make(name: str) -> Made:
    from ultralytics.nn import tasks

    kinds = {"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel", "cls": "ClassificationModel"}
    kind = kinds.get(name.partition("-")[2], "DetectionModel")
    kind = "RTDETRDetectionModel" if name.startswith("rtdetr") else kind
    return getattr(tasks, kind)(f"{name}.yaml", verbose=False).eval(), image(64)


# -- time series, of transformers --------------------------------------------------------------------

_SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "d_model": 32,
           "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_time_features": 1}  # fmt: skip


def _past() -> dict[str, Tensor]:
    return {"past_values": torch.rand(2, 14), "past_time_features": torch.rand(2, 14, 1),
            "past_observed_mask": torch.ones(2, 14), "future_values": torch.rand(2, 4),
            "future_time_features": torch.rand(2, 4, 1)}  # fmt: skip


SERIES: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "time series transformer": ("TimeSeriesTransformerModel", _SERIES, _past),
    "informer": ("InformerModel", {**_SERIES, "sampling_factor": 1}, _past),
    "autoformer": ("AutoformerModel", {**_SERIES, "label_length": 4, "moving_average": 3}, _past),
    "patchtst": (
        "PatchTSTForPrediction",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "prediction_length": 4},
        lambda: {"past_values": torch.rand(2, 32, 3)},
    ),
    "patchtsmixer": (
        "PatchTSMixerForPrediction",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
         "num_layers": 2, "prediction_length": 4},
        lambda: {"past_values": torch.rand(2, 32, 3)},
    ),
}  # fmt: skip


# -- further classes of transformers -----------------------------------------------------------------

_LM = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "intermediate_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
CAUSAL = ("GPTNeoXForCausalLM", "GPTJForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM",
          "Gemma2ForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM",
          "StableLmForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM",
          "HeliumForCausalLM", "NemotronForCausalLM", "PersimmonForCausalLM", "BloomForCausalLM", "MptForCausalLM",
          "FalconForCausalLM", "CodeGenForCausalLM", "BioGptForCausalLM", "XGLMForCausalLM", "SmolLM3ForCausalLM",
          "Ernie4_5ForCausalLM", "GlmForCausalLM")  # fmt: skip
MASKED = ("RobertaForMaskedLM", "ElectraForMaskedLM", "AlbertForMaskedLM", "CamembertForMaskedLM",
          "XLMRobertaForMaskedLM", "RoFormerForMaskedLM", "ConvBertForMaskedLM", "MPNetForMaskedLM",
          "NystromformerForMaskedLM", "SqueezeBertForMaskedLM", "BigBirdForMaskedLM", "FNetForMaskedLM",
          "LayoutLMForMaskedLM", "ErnieForMaskedLM", "MegatronBertForMaskedLM")  # fmt: skip
VISION = ("DeiTForImageClassification", "BeitForImageClassification", "Data2VecVisionForImageClassification",
          "Dinov2ForImageClassification", "ViTMSNForImageClassification", "IJepaForImageClassification",
          "ViTMAEModel", "YolosForObjectDetection", "SiglipVisionModel")  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "MptForCausalLM": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "CodeGenForCausalLM": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "GPTJForCausalLM": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "XGLMForCausalLM": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
    "GlmForCausalLM": {"num_key_value_heads": 2, "head_dim": 16},
    "AlbertForMaskedLM": {"embedding_size": 32},
    "RoFormerForMaskedLM": {"embedding_size": 64},
    "SqueezeBertForMaskedLM": {"embedding_size": 64},
    "BigBirdForMaskedLM": {"attention_type": "original_full"},
    "HeliumForCausalLM": {"head_dim": 16},
    "GemmaForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "Gemma2ForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "Phi3ForCausalLM": {"max_position_embeddings": 64, "original_max_position_embeddings": 64},
    "YolosForObjectDetection": {"image_size": [32, 32], "num_detection_tokens": 4},
}


def class_make(name: str) -> Made:
    """A class of transformers with a small configuration; options that it does not know are attributes."""
    import transformers

    kind = getattr(transformers, name)
    if name in VISION:
        own = {**_VISION, **_OWN.get(name, {})}
        return kind(kind.config_class(**own)).eval(), {"pixel_values": image(32)}
    own = {**_LM, **({"use_cache": False} if name in CAUSAL else {}), **_OWN.get(name, {})}
    if name in CAUSAL and name not in ("BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM"):
        own.setdefault("num_key_value_heads", 2)
    return kind(kind.config_class(**own)).eval(), ids()


def configured(library: str, table: dict[str, Any]) -> Callable[[str], Made]:
    """Makes classes of ``library`` from a table of their names, options and inputs."""

    def make(name: str) -> Made:
        class_name, options, inputs = table[name]
        kind = getattr(importlib.import_module(library), class_name)
        config = getattr(kind, "config_class", None)
        return (kind(config(**options)) if config else kind(**options)).eval(), inputs()

    return make


MORE: dict[str, tuple[tuple[str, ...], Callable[[str], Made]]] = {
    "segmentation_models_pytorch": (SEGMENTATION, segmentation_make),
    "monai": (tuple(MONAI), monai_make),
    "torch_geometric": (GRAPHS, graph_make),
    "vit_pytorch": (tuple(VITS), vit_make),
    "x_transformers": (tuple(XFORMERS), xformer_make),
    "diffusers, further": (tuple(DIFFUSERS), configured("diffusers", DIFFUSERS)),
    "torchaudio": (tuple(AUDIO), audio_make),
    "ultralytics, further": (YOLOS, yolo_make),
    "time series": (tuple(SERIES), configured("transformers", SERIES)),
    "transformers, further": ((*CAUSAL, *MASKED, *VISION), class_make),
}
"""By zoo the names of its models, and what makes one."""

__all__ = ["MORE", "Made"]
