"""placeholder"""
from interlace.plugins.triton.attention_config import default_decode, default_prefill
def choose_configs(shape, dtype, device, folder, tune):
    return default_decode(shape), default_prefill(shape)
