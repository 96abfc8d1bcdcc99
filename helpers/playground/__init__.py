"""The playground: prompt builder, sliders, adapters. engine.py draws, widgets.py is what one presses;
export.py writes the files with which the site's page draws."""

from helpers.playground.widgets import play

__all__ = ["play"]
