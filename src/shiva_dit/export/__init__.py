"""Forwards of a model with an adapter as files that run without this package and diffusers."""

from shiva_dit.export.programs import Programs as Programs
from shiva_dit.export.run import Exported as Exported
from shiva_dit.export.run import export_program as export_program
from shiva_dit.export.run import export_run as export_run
