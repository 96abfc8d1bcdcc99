"""Two pictures of vectors in the plane: classifier-free guidance, and the velocity as a rotation."""

from __future__ import annotations

import math

from helpers.diagrams.canvas import Canvas, Picture, Point
from helpers.diagrams.sizes import sizes


def guidance() -> Picture:
    """Classifier-free guidance: on from the prediction without the prompt, through the one with it, and beyond."""
    size = sizes()
    scale = round(size.guidance)
    canvas = Canvas("guidance", 366)
    origin, without, step = (64.0, 292.0), (140.0, 76.0), (390 / scale, 96 / scale)

    def at(w: float) -> Point:
        return without[0] + w * step[0], without[1] + w * step[1]

    canvas.line(at(1), at(scale), dashed=True)
    canvas.arrow(without, at(1), width=2.4)
    canvas.arrow(origin, without, colour="data", width=3)
    canvas.arrow(origin, at(1), colour="text_encoder", width=3)
    canvas.arrow(origin, at(scale), colour="unet", width=3)
    canvas.dot(*origin)
    for w in range(2, scale):
        canvas.dot(*at(w), radius=4)
        canvas.label(at(w)[0] + 4, at(w)[1] - 12, f"*w* = {w}", anchor="start")
    canvas.label(without[0], 42, "without the prompt", 14, anchor="start", bold=True)
    canvas.label(without[0], 60, "*w* = 0", anchor="start")
    canvas.label(at(1)[0] + 14, at(1)[1] - 24, "with the prompt", 14, anchor="start", bold=True)
    canvas.label(at(1)[0] + 14, at(1)[1] - 6, "*w* = 1", anchor="start")
    canvas.label(at(scale)[0] + 12, at(scale)[1] + 2, "guided", 14, anchor="start", bold=True)
    canvas.label(at(scale)[0] + 12, at(scale)[1] + 20, f"*w* = {scale}, as in the course", anchor="start")
    canvas.rectangle(330, 236, 348, 72, "group-pale", "edge", r=10)
    canvas.label(504, 266, "guided = without + *w* · (with − without)", 14, bold=True)
    canvas.label(504, 290, "The larger *w*, the further along the dashed line.")
    canvas.label(196, 178, "*w* times the step from without to with", anchor="start")
    numbers = math.prod(size.latent)
    canvas.label(64, 340, f"Each arrow is a prediction of the U-Net: {numbers:,} numbers, of which a plane can show two"
                 " directions.", anchor="start")  # fmt: skip
    return canvas.picture(
        "Classifier-free guidance",
        "Three arrows from one origin: the U-Net's prediction without the prompt, the one with the prompt, and the"
        " guided one. Their tips lie on one line. guided = without + w (with - without): w = 0 is without, w = 1 with"
        f" the prompt, and the course's w = {scale} lies {scale} times as far.",
    )


def velocity() -> Picture:
    """The velocity as a rotation: x_t and v are a quarter turn apart, and turn together as noise grows."""
    canvas = Canvas("velocity", 342)
    centre, radius, phi = (216.0, 288.0), 196.0, 36.0
    tip = {name: _on(*centre, radius, turn) for name, turn in (("x0", 0), ("noise", 90), ("xt", phi), ("v", phi + 90))}
    canvas.arc(*centre, radius, 0, 180)
    canvas.line(tip["xt"], (tip["xt"][0], centre[1]), dashed=True, width=1.4)
    canvas.line(tip["xt"], (centre[0], tip["xt"][1]), dashed=True, width=1.4)
    for name, colour in (("x0", "data"), ("noise", "data"), ("xt", "scheduler"), ("v", "unet")):
        canvas.arrow(centre, tip[name], colour=colour, width=3.4)
    ahead = tip["xt"][0] + 62 * math.cos(math.radians(phi + 90)), tip["xt"][1] - 62 * math.sin(math.radians(phi + 90))
    canvas.arrow(tip["xt"], ahead, colour="unet")
    canvas.arc(*centre, 46, 0, phi, "scheduler")
    corner = [_on(*centre, length, turn) for length, turn in ((17, phi), (17 * math.sqrt(2), phi + 45), (17, phi + 90))]
    canvas.line(*corner, width=1.4, bend=0)
    canvas.dot(*centre, radius=4)
    canvas.label(centre[0] + 60, centre[1] - 14, "*φ*", 15, bold=True)
    canvas.label(tip["x0"][0] + 10, centre[1] + 5, "*x*~0~", 17, anchor="start", bold=True)
    canvas.label(tip["x0"][0] - 4, centre[1] + 26, "image", anchor="start")
    canvas.label(centre[0], tip["noise"][1] - 30, "*ε*", 17, bold=True)
    canvas.label(centre[0], tip["noise"][1] - 12, "noise")
    canvas.label(tip["xt"][0] + 10, tip["xt"][1] - 4, "{scheduler:x}~t~", 17, anchor="start", bold=True)
    canvas.label(tip["v"][0] - 12, tip["v"][1] - 6, "{unet:v}", 17, anchor="end", bold=True)
    canvas.label((centre[0] + tip["xt"][0]) / 2 + 18, centre[1] + 26, "cos *φ* = √*ᾱ*~t~", 13)
    canvas.label(centre[0] - 8, tip["xt"][1] + 5, "sin *φ*", 13, anchor="end")
    canvas.label(344, 92, "*x*~t~ moves along *v*\nas noise is added", anchor="start")
    _formulas(canvas)
    return canvas.picture(
        "The velocity as a rotation",
        "A half circle. The image x_0 points right, the noise up. x_t lies on the circle at the angle phi from x_0; its"
        " coordinates are cos phi, which is the square root of alpha-bar, and sin phi. The velocity v lies on the same"
        " circle, a quarter turn further, and points where x_t moves as noise is added. From x_t and v both x_0 and the"
        " noise follow: x_0 = cos phi x_t - sin phi v, noise = sin phi x_t + cos phi v.",
    )


def _formulas(canvas: Canvas) -> None:
    left = 460
    canvas.rectangle(left, 20, 220, 302, "group-pale", "edge", r=10)
    rows = (
        ("Add noise: turn by *φ*", ("{scheduler:x}~t~ = cos *φ* *x*~0~ + sin *φ* *ε*",)),
        ("The velocity, the target", ("{unet:v} = cos *φ* *ε* − sin *φ* *x*~0~",)),
        (
            "Solve for both",
            (
                "*x*~0~ = cos *φ* {scheduler:x}~t~ − sin *φ* {unet:v}",
                "*ε* = sin *φ* {scheduler:x}~t~ + cos *φ* {unet:v}",
            ),
        ),
    )
    y = 48
    for title, formulas in rows:
        canvas.label(left + 16, y, title, 13, anchor="start", bold=True)
        for number, formula in enumerate(formulas):
            canvas.label(left + 16, y + 28 + 28 * number, formula, 15, anchor="start")
        y += 40 + 28 * len(formulas)
    canvas.label(left + 16, y + 2, "*φ* grows with the timestep *t*:\n0 is the image, a quarter turn\nis noise alone.",
                 anchor="start")  # fmt: skip


def _on(x: float, y: float, radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return x + radius * math.cos(angle), y - radius * math.sin(angle)
