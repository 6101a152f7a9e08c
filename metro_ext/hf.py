"""Hugging Face classes for bucket settings that stock MPNet does not compute.

``import metro_ext.hf`` registers them with the Auto classes; needs transformers. The only change
to MPNet is that the buckets follow the configuration.
"""

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetModel,
)
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder


class MetroMPNetConfig(MPNetConfig):
    """MPNet's configuration, and the distance from which on all share the last bucket."""

    model_type = "metro_mpnet"
    relative_attention_max_distance: int = 128


class MetroMPNetEncoder(MPNetEncoder):
    """MPNet's layers with the configuration's buckets."""

    def compute_position_bias(
        self, x: Tensor, position_ids: object = None, num_buckets: object = None
    ) -> Tensor:
        """[B, heads, L, L] for hidden states x [B, L, H]; the two options are not used."""
        place = torch.arange(x.size(1), device=x.device)
        bucket = self.relative_position_bucket(
            place[None, :] - place[:, None],
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        values = self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)
        return values.expand(x.size(0), -1, -1, -1).contiguous()


class MetroMPNetModel(MPNetModel):
    config_class = MetroMPNetConfig

    def __init__(self, config: MetroMPNetConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer)
        self.encoder = MetroMPNetEncoder(config)
        self.post_init()


class MetroMPNetForMaskedLM(MPNetForMaskedLM):
    config_class = MetroMPNetConfig

    def __init__(self, config: MetroMPNetConfig):
        super().__init__(config)
        self.mpnet = MetroMPNetModel(config, add_pooling_layer=False)
        self.post_init()


class MetroMPNetForSequenceClassification(MPNetForSequenceClassification):
    config_class = MetroMPNetConfig

    def __init__(self, config: MetroMPNetConfig):
        super().__init__(config)
        self.mpnet = MetroMPNetModel(config, add_pooling_layer=False)
        self.post_init()


class MetroMPNetForQuestionAnswering(MPNetForQuestionAnswering):
    config_class = MetroMPNetConfig

    def __init__(self, config: MetroMPNetConfig):
        super().__init__(config)
        self.mpnet = MetroMPNetModel(config, add_pooling_layer=False)
        self.post_init()


AutoConfig.register("metro_mpnet", MetroMPNetConfig)
AutoModel.register(MetroMPNetConfig, MetroMPNetModel)
AutoModelForMaskedLM.register(MetroMPNetConfig, MetroMPNetForMaskedLM)
AutoModelForSequenceClassification.register(MetroMPNetConfig, MetroMPNetForSequenceClassification)
AutoModelForQuestionAnswering.register(MetroMPNetConfig, MetroMPNetForQuestionAnswering)
