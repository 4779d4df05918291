"""Captioned pictures as training data: encoded once by a pipeline, then read."""

from shiva_dit.training.pictures.encode import Encoding, encode, encode_folder
from shiva_dit.training.pictures.encoded import FolderData
from shiva_dit.training.pictures.encoders import Facts
from shiva_dit.training.pictures.scan import BadPicturesError

__all__ = ["BadPicturesError", "Encoding", "Facts", "FolderData", "encode", "encode_folder"]
