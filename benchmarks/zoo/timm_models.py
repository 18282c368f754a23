"""The models of timm: the smallest of every file, and more where a file holds several architectures."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.zoo.models import Specimen

_NAMES = """
    beit_base_patch16_224 halonet_h1 botnet26t_256 lambda_resnet26t mobileone_s1 gernet_s repvgg_a0 regnetz_b16
    eca_resnext26ts gcresnext26ts bat_resnext26ts resnet50_clip cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny
    convmixer_768_32 convnext_atto convnext_zepto_rms convnextv2_atto test_convnext cpubone_nano crossvit_tiny_240
    csatv2 cs3darknet_focus_s cspresnext50 darknet17 sedarknet21 cspnext_tiny davit_tiny
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla46x_c dla34 dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientnet_lite0
    efficientnet_cc_b0_4e efficientnet_es efficientnetv2_rw_t fbnetc_100 mixnet_s mnasnet_small spnasnet_100
    tinynet_e test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0 eva02_tiny_patch14_224
    vit_tiny_patch16_dinov3_qkvb vit_small_patch16_rope_mixed_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small levit_128s levit_conv_128s lowformer_b0 test_mambaout maxvit_pico_rw_256 coatnet_pico_rw_224
    coatnext_nano_rw_224 maxxvit_rmlp_nano_rw_256 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
    gmlp_ti16_224 gmixer_12_224 resmlp_12_224 mixer_s32_224 mobilenetv3_small_050 lcnet_035 fbnetv3_b
    mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    naflexvit_base_patch16_gap nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 eca_nfnet_l0 test_nfnet pit_ti_224
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s res2next50
    resnest14d resnet10t ecaresnet26t seresnext26d_32x4d resnetblur50 resnetv2_18 resnetv2_50x1_bit rexnet_100
    selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224
    tresnet_m twins_svt_small twins_pcpvt_small vgg11_bn visformer_tiny test_vit test_vit2 test_vit3
    vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos vit_srelpos_small_patch16_224 samvit_base_patch16_224
    vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41 xcit_nano_12_p8_224 gemma4_vit_167m
    nasnetalarge pnasnet5large
"""
FAMILIES = dict.fromkeys(_NAMES.split(), "timm")
_SIDES = ((96, 128), (128, 160), (192, 224), (256, 288))  # the first that a model takes


def build(name: str) -> Specimen:
    """A model of timm without pretrained weights, and images as small as it takes."""
    model = timm.create_model(name, pretrained=False).eval()
    settings: dict[str, Any] = model.default_cfg
    channels, side = settings["input_size"][0], settings["input_size"][-1]
    if not settings.get("fixed_input_size"):
        for small, other in _SIDES:
            if small < side and _takes(model, _noise(2, channels, small)):
                return Specimen(
                    model, _noise(2, channels, small), (_noise(3, channels, small),), (_noise(2, channels, other),)
                )
    return Specimen(model, _noise(2, channels, side), (_noise(3, channels, side),), (_noise(2, channels, side + 32),))


def _takes(model: nn.Module, images: Tensor) -> bool:
    """Whether a model runs on images of this size."""
    try:
        with torch.no_grad():
            model(images)
    except Exception:
        return False
    return True


def _noise(batch: int, channels: int, side: int) -> Tensor:
    return torch.rand(batch, channels, side, side)
