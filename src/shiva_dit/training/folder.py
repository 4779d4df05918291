"""Captioned pictures as training data: encoded once by a pipeline, then read."""

from shiva_dit.training.pictures.encode import encode, encode_folder
from shiva_dit.training.pictures.encoded import FolderData
from shiva_dit.training.pictures.encoders import Facts
from shiva_dit.training.pictures.scan import BadPicturesError
from shiva_dit.training.pictures.settings import Encoding

__all__ = ["BadPicturesError", "Encoding", "Facts", "FolderData", "encode", "encode_folder"]
