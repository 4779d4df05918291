"""The saved artefact: what it is for, what it is made of, how it is stored and shared."""

from shiva_dit.adapter.config import ShivaConfig as ShivaConfig
from shiva_dit.adapter.shiva_adapter import ShivaAdapter as ShivaAdapter
