"""Configuration: `Settings`, and `load_settings`, which merges file, environment, flags and constructor."""

from interlace.config.loading import LoadedSettings, debug_requested, effective, environment, load_settings
from interlace.config.reference import Setting, all_settings, describe, nearest_key, plain_text, setting_fields
from interlace.config.settings import PluginSettings, Settings, parse_memory
from interlace.config.sources import OTHER_VARIABLES, convert_texts

__all__ = [
    "OTHER_VARIABLES",
    "LoadedSettings",
    "PluginSettings",
    "Setting",
    "Settings",
    "all_settings",
    "convert_texts",
    "debug_requested",
    "describe",
    "effective",
    "environment",
    "load_settings",
    "nearest_key",
    "parse_memory",
    "plain_text",
    "setting_fields",
]
