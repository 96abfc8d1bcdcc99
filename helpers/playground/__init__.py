"""The playground: prompt builder, sliders, adapters. engine.py draws, widgets.py is what one presses."""

from helpers.playground.widgets import play

__all__ = ["play"]
