"""Draw small procedural faces, in five styles, from one shared set of named factors.

A face is a handful of independent numbers and choices (skin, hair, gaze, smile, head turn...).
The same face can be drawn in every style, so two styles of one seed show the same people.

    python data/draw_faces.py --style photo --n 64 --seed 1 --out faces   # faces/00000.png ...
    python data/draw_faces.py --sheet faces.png                           # all styles, one sheet
    python data/draw_faces.py --ten-shot                                  # the 10-shot target sets
"""

import argparse
import functools
import itertools
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

FRAME = 64          # geometry is written in pixels of a 64 x 64 picture, whatever the resolution
SUPERSAMPLE = 4     # shapes are drawn this much larger, then reduced, for smooth edges
HEAD_SIZE = 1.3     # from the units of a head to those of the frame
SKULL = 2.15        # how square the upper half of a head is (2 is an ellipse)
MAX_TURN = np.radians(25)
MAX_TILT = np.radians(14)
CHUNK = 250         # faces that a worker process draws before it hands them back

TEN_SHOT_SEED = 2501    # chosen for ten varied people, and unlike the seeds that users type
TEN_SHOT_FOLDERS = {"emoji": "10shot", "sketch": "10shot_sketch", "statue": "10shot_statue",
                    "houses": "10shot_houses"}


# ---------------------------------------------------------------- the factors of a face

def between(low, high):
    """A factor drawn evenly from low..high."""
    return field(metadata={"draw": lambda rng: float(rng.uniform(low, high))})


def one_of(**odds):
    """A factor that takes one of the given names, with the given odds."""
    names, weights = list(odds), np.array(list(odds.values()), float)
    weights /= weights.sum()
    return field(metadata={"draw": lambda rng: names[rng.choice(len(names), p=weights)]})


@dataclass(frozen=True)
class Face:
    """Every factor is drawn on its own: knowing one says nothing about another."""
    skin: float = between(0, 1)            # palest .. darkest
    hair_color: float = between(0, 1)      # black, brown, ginger, blond .. white
    hair_dye: str = one_of(none=86, pink=5, blue=5, green=4)
    hair_cut: str = one_of(bald=9, short=17, side=16, fringe=16, long=16, curly=14, bun=12)
    head_width: float = between(-1, 1)     # narrow .. wide
    head_length: float = between(-1, 1)    # short .. long
    jaw: float = between(-1, 1)            # pointed .. square
    eye_size: float = between(-1, 1)       # small .. large
    eye_spacing: float = between(-1, 1)    # close together .. far apart
    eye_color: float = between(0, 1)       # brown, hazel, green, blue .. grey
    gaze_x: float = between(-1, 1)         # looks to the picture's left .. right
    gaze_y: float = between(-1, 1)         # looks up .. down
    brow_angle: float = between(-1, 1)     # angry .. worried
    brow_weight: float = between(-1, 1)    # thin .. bushy
    brow_height: float = between(-1, 1)    # low .. raised
    nose_width: float = between(-1, 1)     # narrow .. wide
    nose_length: float = between(-1, 1)    # short .. long
    smile: float = between(-1, 1)          # frown .. smile
    mouth_open: float = between(-0.8, 1)   # closed at 0 and below .. wide open
    glasses: str = one_of(none=64, round=18, square=18)
    glasses_color: float = between(0, 1)   # black, red, blue .. black
    beard: str = one_of(none=58, stubble=14, full=14, moustache=14)
    turn: float = between(-1, 1)           # head turned to the picture's left .. right
    tilt: float = between(-1, 1)           # head leaning to the left .. right
    light: float = between(-1, 1)          # the light comes from the left .. right
    background: float = between(0, 1)      # round the colour wheel
    background_depth: float = between(0, 1)  # light .. dark
    clothes: float = between(0, 1)         # round the colour wheel


def sample_face(rng):
    """Draw one Face from a numpy Generator."""
    return Face(**{f.name: f.metadata["draw"](rng) for f in fields(Face)})


# ---------------------------------------------------------------- colours

SKIN = [(255, 226, 207), (246, 203, 172), (231, 178, 138), (204, 144, 100), (160, 103, 68),
        (120, 74, 50), (84, 52, 38)]
HAIR = [(30, 26, 32), (58, 36, 30), (92, 52, 30), (150, 58, 28), (214, 104, 36),
        (240, 184, 76), (244, 216, 148), (226, 226, 230)]
DYE = {"pink": (236, 104, 160), "blue": (72, 128, 222), "green": (66, 176, 138)}
EYES = [(84, 48, 26), (138, 92, 36), (70, 138, 66), (46, 124, 208), (120, 152, 176)]
RIMS = [(20, 20, 26), (176, 28, 40), (36, 62, 150), (20, 20, 26)]
WHEEL = [(236, 92, 88), (246, 156, 66), (246, 212, 88), (118, 200, 100), (60, 190, 182),
         (70, 146, 236), (146, 112, 228), (230, 108, 184), (236, 92, 88)]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
BILINEAR = Image.Resampling.BILINEAR


def mix(a, b, t):
    """The colour a share t of the way from a to b."""
    return tuple(int(round(x + (y - x) * t)) for x, y in zip(a, b))


def pick(stops, t):
    """The colour at position t of 0..1 along a row of colours."""
    place = t * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    return mix(stops[left], stops[left + 1], place - left)


def natural_colors(face):
    """The colour of each part of a face, as in life."""
    skin = pick(SKIN, face.skin)
    hair = DYE.get(face.hair_dye) or pick(HAIR, face.hair_color)
    ground = pick(WHEEL, face.background)
    return {
        "skin": skin, "hair": hair, "beard": mix(hair, BLACK, 0.25), "brow": mix(hair, BLACK, 0.3),
        "blush": mix(skin, (226, 70, 70), 0.42), "shadow": mix(skin, (70, 14, 30), 0.6),
        "lips": mix(skin, (208, 52, 70), 0.62), "mouth": (92, 20, 30), "teeth": (250, 248, 242),
        "tongue": (214, 96, 100), "eye": (250, 250, 250), "iris": pick(EYES, face.eye_color),
        "pupil": (18, 14, 18), "lash": mix((40, 24, 24), hair, 0.12), "glint": WHITE,
        "rim": pick(RIMS, face.glasses_color), "lens": (214, 236, 255),
        "ground": pick([mix(ground, WHITE, 0.5), mix(ground, (90, 90, 110), 0.1),
                        mix(ground, (24, 26, 60), 0.6)], face.background_depth),
        "clothes": mix(pick(WHEEL, face.clothes), (40, 36, 70), 0.2),
    }


# ---------------------------------------------------------------- curves and the head's pose

def smooth(points, closed=False, rounds=3):
    """Round the corners of a line by cutting them off, again and again (Chaikin)."""
    points = np.asarray(points, float)
    for _ in range(rounds):
        ahead = np.roll(points, -1, axis=0) if closed else points[1:]
        here = points if closed else points[:-1]
        cut = np.stack([0.75 * here + 0.25 * ahead, 0.25 * here + 0.75 * ahead], 1).reshape(-1, 2)
        points = cut if closed else np.concatenate([points[:1], cut, points[-1:]])
    return points


def ellipse(x, y, rx, ry, power=2.0, n=36):
    """A closed ellipse; a power above 2 squares it off."""
    angle = np.arange(n) * (2 * np.pi / n)
    c, s = np.cos(angle), np.sin(angle)
    if power == 2:
        return np.stack([x + rx * c, y + ry * s], 1)
    return np.stack([x + rx * np.sign(c) * np.abs(c) ** (2 / power),
                     y + ry * np.sign(s) * np.abs(s) ** (2 / power)], 1)


def ribbon(points, width, closed=False):
    """The outline of a line of some width along the points."""
    if closed:
        points = np.concatenate([points[-1:], points, points[:2]])
    along = np.gradient(points, axis=0)
    across = along[:, ::-1] * (-1, 1) / np.maximum(np.hypot(*along.T), 1e-6)[:, None] * width / 2
    if closed:
        points, across = points[1:-1], across[1:-1]
    return np.concatenate([points + across, (points - across)[::-1]])


class Head:
    """The head's outline, and the way from a point on the face to a point in the picture.

    Face coordinates have their origin in the middle of the head, x to the right and y down.
    """

    def __init__(self, face):
        self.width = 17.0 + 1.9 * face.head_width
        self.top = 18.6 + 0.8 * face.head_length
        self.chin = 20.0 + 2.0 * face.head_length
        self.jaw = 2.2 + 0.58 * face.jaw
        self.turn = face.turn * MAX_TURN
        tilt = face.tilt * MAX_TILT
        self.rotation = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def place(self, points):
        """Tilt points of the head's own plane into the picture, round a pivot near the chin."""
        return (np.asarray(points, float) - (0, 9)) @ self.rotation * HEAD_SIZE + (32, 45.5)

    def bend(self, points, lift=0.0):
        """Move face points round the turned head as if on a ball; lift raises them off it."""
        x, y = np.array(points, float).T
        longitude = np.arcsin(np.maximum(-1, np.minimum(1, x / self.width))) + self.turn
        x = self.width * np.sin(np.maximum(-np.pi / 2, np.minimum(np.pi / 2, longitude)))
        low = y > 0
        height = np.minimum(0.98, np.abs(y) / np.where(low, self.chin, self.top))
        power = np.where(low, self.jaw, SKULL)
        half = self.width * (1 - height ** power) ** (1 / power)       # of the head, at height y
        middle = self.chin_shift(y)
        x = np.maximum(middle - half, np.minimum(middle + half, x))
        return np.stack([x + lift * np.sin(self.turn), y], 1)

    def chin_shift(self, y):
        """How far the turned head's outline has moved sideways at a height."""
        return 10 * np.sin(self.turn) * np.maximum(0, np.minimum(1, y / self.chin)) ** 2

    def on_face(self, points, lift=0.0):
        """From a point on the face to the picture."""
        return self.place(self.bend(points, lift))

    def rim(self, start, end, grow=0.0, n=40):
        """The outline between two angles (0 = right, 90 = chin, 270 = top), `grow` further out."""
        angle = np.radians(np.linspace(start, end, n))
        c, s = np.cos(angle), np.sin(angle)
        power = 2 / np.where(s > 0, self.jaw, SKULL)
        x = (self.width + grow) * np.sign(c) * np.abs(c) ** power
        y = np.where(s > 0, self.chin + grow, self.top + grow) * np.sign(s) * np.abs(s) ** power
        return np.stack([x + self.chin_shift(y), y], 1)


# ---------------------------------------------------------------- the photo pen

@functools.cache
def ball_light(side):
    """A 64 x 64 mask: how much light reaches each point of a ball lit from `side` (-1 or 1)."""
    v, u = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.maximum(np.hypot(u, v), 1e-6)
    squeeze = np.minimum(1, 0.97 / radius)
    u, v = u * squeeze, v * squeeze
    light = side * 0.6 * u - 0.5 * v + 0.62 * np.sqrt(1 - u * u - v * v)
    return Image.fromarray((255 * np.clip(0.32 + 0.68 * light, 0, 1)).astype(np.uint8))


class PhotoPen:
    """Fills shapes with rounded light and shade; the parts' outlines come from paint_face.

    Points are in units of the 64 x 64 frame, a part is a name in the palette, and a clip is a
    mask from mask() outside which nothing is drawn. Other styles change what each method leaves.
    """

    def __init__(self, face, resolution):
        self.scale = resolution * SUPERSAMPLE / FRAME
        self.side = resolution * SUPERSAMPLE
        self.colors = self.palette(face)
        self.canvas = Image.new("RGB", (self.side, self.side))
        self.draw = ImageDraw.Draw(self.canvas)
        self.light = Image.blend(ball_light(-1), ball_light(1), 0.5 + 0.5 * face.light)
        self.light_side = face.light

    def palette(self, face):
        """The colour of every part."""
        return natural_colors(face)

    def mask(self, points):
        """A full-size mask of one closed shape, to clip others by."""
        mask = Image.new("L", self.canvas.size)
        ImageDraw.Draw(mask).polygon((points * self.scale).ravel().tolist(), fill=255)
        return mask

    def patch(self, points, clip=None):
        """The smallest box that holds a closed shape, and the shape's mask inside that box."""
        points = points * self.scale
        low, high = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int) + 1
        mask = Image.new("L", tuple((high - low).tolist()))
        ImageDraw.Draw(mask).polygon((points - low).ravel().tolist(), fill=255)
        box = (*low.tolist(), *high.tolist())
        return box, ImageChops.multiply(mask, clip.crop(box)) if clip else mask

    def background(self):
        """A soft slope of light, brighter on the side the light comes from."""
        slope = self.light.crop((12, 12, 52, 52))       # the ball's middle: no edge to be seen
        base = self.colors["ground"]
        self.canvas.paste(mix(base, BLACK, 0.25), (0, 0, self.side, self.side))
        self.canvas.paste(mix(base, WHITE, 0.3), mask=slope.resize(self.canvas.size, BILINEAR))

    def shape(self, points, part, clip=None):
        """Fill a closed shape as a solid, rounded body: all in shade, then the light on it."""
        box, mask = self.patch(points, clip)
        self.canvas.paste(self.dim(self.colors[part]), box, mask)
        lit = ImageChops.multiply(mask, self.light.resize(mask.size, BILINEAR))
        self.canvas.paste(self.bright(self.colors[part]), box, lit)

    def bright(self, color):
        """A colour in full light: stronger, as far as it can be without changing its hue."""
        gain = min(1.2, 255 / max(color))
        return mix([gain * c for c in color], (255, 250, 240), 0.1)

    def dim(self, color):
        """A colour in the shade, a little warmer."""
        return tuple(int(share * c) for share, c in zip((0.62, 0.5, 0.53), color))

    def flat(self, points, part, clip=None):
        """Fill a small closed shape with one plain colour."""
        box, mask = self.patch(points, clip)
        self.canvas.paste(self.colors[part], box, mask)

    def stroke(self, points, part, width, closed=False):
        """Draw a line; an open one has round ends."""
        points, width, color = points * self.scale, width * self.scale, self.colors[part]
        self.draw.polygon(ribbon(points, width, closed).ravel().tolist(), fill=color)
        for x, y in () if closed else (points[0], points[-1]):
            r = width / 2 - 0.5
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def soft(self, points, part, strength, blur, clip=None):
        """Lay a blurred shape over the picture: shadow, blush, shine. part may be a colour."""
        low = np.floor(points.min(0) - 2.5 * blur).astype(int)
        high = np.ceil(points.max(0) + 2.5 * blur).astype(int)
        small = Image.new("L", tuple((2 * (high - low)).tolist()))      # two pixels to a unit
        ImageDraw.Draw(small).polygon((2 * (points - low)).ravel().tolist(), round(255 * strength))
        small = small.filter(ImageFilter.GaussianBlur(2 * blur))
        box = tuple(round(v * self.scale) for v in (*low.tolist(), *high.tolist()))
        mask = small.resize((box[2] - box[0], box[3] - box[1]), BILINEAR)
        color = self.colors[part] if isinstance(part, str) else part
        self.canvas.paste(color, box, ImageChops.multiply(mask, clip.crop(box)) if clip else mask)

    def nose(self, points):
        """The nose's tip, a ball in front of the face."""
        self.shape(points, "skin")

    def iris(self, head, x, y, radius, room):
        """A coloured disc with a pupil and a glint, cut off by the eye's edge."""
        self.flat(head.on_face(ellipse(x, y, radius, radius)), "iris", room)
        self.flat(head.on_face(ellipse(x, y, 0.52 * radius, 0.52 * radius)), "pupil", room)
        x, y = x + 0.4 * radius * (1 if self.light_side > 0 else -1), y - 0.4 * radius
        self.flat(head.on_face(ellipse(x, y, 0.75, 0.75)), "glint", room)

    def finish(self):
        """The picture at its final size."""
        return self.canvas.reduce(SUPERSAMPLE)


# ---------------------------------------------------------------- the other styles' pens

class EmojiPen(PhotoPen):
    """Flat colours inside thick dark outlines, with no light and shade at all."""

    def palette(self, face):
        colors, line, yellow = natural_colors(face), (52, 34, 30), (255, 206, 56)
        return {**colors, "skin": yellow, "ground": WHITE, "line": line, "lash": line,
                "brow": line, "mouth": (84, 22, 28),
                "lips": (214, 70, 60) if face.beard == "full" else line,    # seen on a dark beard
                "stubble": mix(yellow, colors["beard"], 0.45)}

    def background(self):
        self.canvas.paste(self.colors["ground"], (0, 0, self.side, self.side))

    def shape(self, points, part, clip=None):
        self.flat(points, part, clip)
        if part != "lips":
            self.stroke(points, "line", 1.5, closed=True)

    def flat(self, points, part, clip=None):
        super().flat(points, part, clip)
        if part == "eye":
            self.stroke(points, "line", 0.8, closed=True)

    def soft(self, points, part, strength, blur, clip=None):
        """Of all the soft shades only stubble matters enough to be drawn."""
        if part == "beard":
            self.flat(points, "stubble", clip)

    def nose(self, points):
        """Just the lower half of the tip's edge."""
        self.stroke(points[:len(points) // 2 + 1], "line", 1.5)

    def iris(self, head, x, y, radius, room):
        """One bold black dot."""
        self.flat(head.on_face(ellipse(x, y, 0.85 * radius, 0.85 * radius)), "pupil", room)


@functools.cache
def hatching(side, scale):
    """A mask of slanted pencil lines, wide enough apart to be seen one by one at 64 pixels."""
    down, across = np.mgrid[:side, :side] / scale
    return Image.fromarray(np.where((across + down) % 4.8 < 1.7, 255, 0).astype(np.uint8))


class SketchPen(EmojiPen):
    """Pencil on paper: thin grey outlines, with hatching where a colour or a shade is dark."""

    def palette(self, face):
        paper, pencil = (243, 238, 226), (64, 64, 70)
        greys = {part: mix(paper, pencil, 1 - sum(color) / 765)
                 for part, color in natural_colors(face).items()}
        blank = dict.fromkeys(("ground", "eye", "teeth", "tongue"), paper)
        dark = dict.fromkeys(("line", "lips", "lash", "rim", "pupil", "brow"), pencil)
        return {**greys, **blank, **dark, "skin": mix(paper, pencil, 0.45),
                "stubble": mix(greys["beard"], pencil, 0.4)}

    def stroke(self, points, part, width, closed=False):
        super().stroke(points, part, 0.68 * width, closed)

    def flat(self, points, part, clip=None):
        if part not in ("skin", "hair", "beard", "clothes", "stubble"):
            return super().flat(points, part, clip)
        box, mask = self.patch(points, clip)
        tint = 0 if part in ("skin", "stubble") else 0.35
        self.canvas.paste(mix(self.colors["ground"], self.colors[part], tint), box, mask)
        if part == "skin":      # hatched only where the light does not reach
            shade = self.light.point(lambda light: 255 if light < 105 else 0)
            mask = ImageChops.multiply(mask, shade.resize(mask.size))
        lines = hatching(self.side, self.scale).crop(box)
        self.canvas.paste(self.colors[part], box, ImageChops.multiply(mask, lines))


class StatuePen(PhotoPen):
    """Pale stone under a hard light: one colour, carved edges, blank eyes."""

    def __init__(self, face, resolution):
        super().__init__(face, resolution)
        self.light = self.light.point(lambda light: min(255, max(0, int(1.45 * light) - 84)))

    def background(self):
        self.canvas.paste(self.colors["ground"], (0, 0, self.side, self.side))

    def palette(self, face):
        tones = dict(skin=226, hair=184, beard=146, brow=140, blush=224, lips=184, mouth=44,
                     teeth=226, tongue=120, eye=236, lash=88, glint=255, rim=92, lens=190,
                     shadow=26, clothes=170, ground=40, line=70)
        return {part: (tone, int(0.97 * tone), int(0.92 * tone)) for part, tone in tones.items()}

    def dim(self, color):
        return tuple(int(0.3 * c) for c in color)

    def shape(self, points, part, clip=None):
        super().shape(points, part, clip)
        if part in ("hair", "beard"):
            self.stroke(points, "line", 0.5, closed=True)

    def iris(self, head, x, y, radius, room):
        """A blank ball, and a shallow dent where an iris would be."""
        self.soft(head.on_face(ellipse(x, y, radius, radius)), "shadow", 0.3, 0.7, room)


class HousePen(PhotoPen):
    """The photo's light and shade, with the colours of a street."""

    def palette(self, face):
        colors = natural_colors(face)
        walls = pick([(250, 240, 214), (246, 214, 140), (240, 168, 130), (214, 104, 84),
                      (150, 66, 56), (112, 92, 96)], face.skin)
        return {**colors, "wall": walls, "wall_side": self.dim(walls), "roof": colors["hair"],
                "roof_side": self.dim(colors["hair"]), "frame": (250, 246, 238),
                "glass": mix(colors["iris"], (190, 226, 255), 0.3), "door": colors["clothes"],
                "grass": mix((104, 172, 78), (60, 120, 90), face.clothes),
                "hedge": (46, 112, 58), "brick": (146, 70, 58)}


# ---------------------------------------------------------------- one face, part by part

def paint_face(pen, face):
    """Draw a face from back to front."""
    head = Head(face)
    pen.background()
    paint_body(pen, face, head)
    outline = head.place(head.rim(0, 360, n=72)[:-1])
    skin = pen.mask(outline)
    far = 1 if head.turn > 0 else -1
    paint_ear(pen, face, head, far)
    pen.shape(outline, "skin")
    paint_ear(pen, face, head, -far)
    paint_cheeks(pen, head, skin)
    paint_beard(pen, face, head, skin)
    paint_mouth(pen, face, head)
    paint_nose(pen, face, head, skin)
    paint_eyes(pen, face, head, skin)
    paint_hair(pen, face, head, skin)
    paint_brows(pen, face, head)
    paint_glasses(pen, face, head)


def paint_body(pen, face, head):
    """Shoulders, the hair that hangs behind the head, and the neck."""
    pen.shape(smooth([(-1, 76), (2, 63), (18, 57), (46, 57), (62, 63), (65, 76)], True), "clothes")
    back = hair_behind(face, head)
    if back is not None:
        pen.shape(head.place(back), "hair")
    neck = np.array([(24.5, 44), (39.5, 44), (40, 58), (32, 64), (24, 58)], float)
    lean = head.place([(0, 12)])[0, 0] - 32
    neck[:2, 0] += lean
    neck = smooth(neck, True)
    pen.shape(neck, "skin")
    pen.soft(head.place(head.rim(0, 180, 2.5)), "shadow", 0.6, 1.6, pen.mask(neck))


def hair_behind(face, head):
    """The outline of the hair seen behind the head, or None."""
    if face.hair_cut == "long":
        w = head.width + 3.2
        sides = smooth([(w, -2), (w + 1.2, 12), (w + 2.2, 24), (w - 5, 27), (0, 24),
                        (5 - w, 27), (-w - 2.2, 24), (-w - 1.2, 12), (-w, -2)])
        return np.concatenate([head.rim(180, 360, 3.4), sides])
    if face.hair_cut == "curly":
        angle = np.linspace(150, 390, 120)
        bumps = 4.6 + 1.5 * np.abs(np.sin(np.radians(angle - 150) * 6.75))
        return head.rim(150, 390, bumps, n=120)
    if face.hair_cut == "bun":
        return ellipse(-2.5 * np.sin(head.turn), -head.top - 3.5, 6.6, 5.6)
    return None


# The lower edge of the hair on the face, right to left: (x as a share of the head's width, y).
HAIRLINES = {
    "short": [(1, 3), (0.94, -3), (0.84, -9), (0.5, -11.5), (0, -11), (-0.5, -11.5),
              (-0.84, -9), (-0.94, -3), (-1, 3)],
    "side": [(1, 3), (0.95, -2), (0.9, -6), (0.6, -6.6), (0.1, -9), (-0.45, -15), (-0.75, -11),
             (-0.92, -4), (-1, 3)],
    "fringe": [(1, 10), (0.97, 8), (0.94, 0), (0.92, -6.8), (0.8, -7.2), (0, -6.6), (-0.8, -7.2),
               (-0.92, -6.8), (-0.94, 0), (-0.97, 8), (-1, 10)],
    "long": [(1, 12), (0.93, 3), (0.86, -5), (0.45, -11), (0, -15), (-0.45, -11), (-0.86, -5),
             (-0.93, 3), (-1, 12)],
    "curly": [(1, 4), (0.9, -2), (0.93, -5), (0.75, -7), (0.7, -9.5), (0.4, -9), (0.25, -11),
              (0, -9.5), (-0.25, -11), (-0.4, -9), (-0.7, -9.5), (-0.75, -7), (-0.93, -5),
              (-0.9, -2), (-1, 4)],
    "bun": [(1, 1), (0.93, -6), (0.75, -11), (0, -13.5), (-0.75, -11), (-0.93, -6), (-1, 1)],
}
HAIR_DEPTH = {"short": 2.2, "side": 3.6, "fringe": 3.8, "long": 3.4, "curly": 4.4, "bun": 1.8}
CAP_ENDS = {"long": (142, 398), "fringe": (150, 390)}


def paint_hair(pen, face, head, skin):
    """The hair on the head: from its outer edge down to the hairline."""
    if face.hair_cut not in HAIRLINES:
        pen.soft(head.place(ellipse(7 * pen.light_side, -12.5, 5, 2.6)), "glint", 0.35, 1.8, skin)
        return
    hairline = smooth([(x * head.width, y) for x, y in HAIRLINES[face.hair_cut]], rounds=2)
    depth = HAIR_DEPTH[face.hair_cut]
    ends = CAP_ENDS.get(face.hair_cut, (166, 374))
    angle = np.linspace(0, 1, 60)
    grow = depth * np.clip(np.minimum(angle, 1 - angle) * 9, 0.15, 1)
    if face.hair_cut == "curly":
        grow = grow + 1.4 * np.abs(np.sin(angle * np.pi * 11))
    cap = np.concatenate([head.rim(*ends, grow, n=60), head.bend(hairline)])
    shade = np.concatenate([head.rim(180, 360, -2), head.bend(hairline)]) + (0, 1.6)
    pen.soft(head.place(shade), "shadow", 0.5, 1.3, skin)
    cap = head.place(cap)
    pen.shape(cap, "hair")
    shine = head.rim(235, 305, -2.2, n=14)
    shine = np.concatenate([shine, head.rim(305, 235, -5.2, n=14)]) + (5 * pen.light_side, 0)
    pen.soft(head.place(shine), mix(pen.colors["hair"], WHITE, 0.55), 0.5, 1.4, pen.mask(cap))


def paint_ear(pen, face, head, side):
    """One ear, set a little behind the middle of the head's side; long hair hides it."""
    if face.hair_cut == "long":
        return
    x = head.width * np.sin(side * np.radians(98) + head.turn) + side * 0.8
    pen.shape(head.place(ellipse(x, 3, 3, 4.6)), "skin")
    pen.soft(head.place(ellipse(x, 3.2, 1.3, 2.6)), "shadow", 0.45, 0.7)


def paint_cheeks(pen, head, skin):
    """A blush on both cheeks and a hint of shade in the eye sockets."""
    for side in (-1, 1):
        pen.soft(head.on_face(ellipse(side * 10, 9, 4, 3)), "blush", 0.42, 2.2, skin)
        pen.soft(head.on_face(ellipse(side * 7.5, 0.5, 5.5, 4.5)), "shadow", 0.22, 1.6, skin)
    pen.soft(head.place(head.rim(50, 130, -1)), "shadow", 0.16, 2, skin)


def paint_beard(pen, face, head, skin):
    """Stubble (a shadow on the skin), a full beard, or a moustache alone."""
    if face.beard == "none":
        return
    if face.beard == "moustache":
        edge = [(0, 9.6), (3, 9.2), (7, 11.2), (9, 14), (5.5, 12.6), (0, 12), (-5.5, 12.6),
                (-9, 14), (-7, 11.2), (-3, 9.2)]
        pen.shape(head.on_face(smooth(edge, True, 2), 1.2), "beard")
        return
    w = head.width
    cheek = [(-w, 1), (-0.93 * w, 6), (-0.72 * w, 10.5), (-5.5, 9.4), (0, 9), (5.5, 9.4),
             (0.72 * w, 10.5), (0.93 * w, 6), (w, 1)]
    full = face.beard == "full"
    jaw = head.rim(-3, 183, np.sin(np.linspace(0, np.pi, 40)) * (2.6 if full else 0.2))
    edge = head.place(np.concatenate([jaw, head.bend(smooth(cheek))]))
    if full:
        pen.shape(edge, "beard")
    else:
        pen.soft(edge, "beard", 0.62, 0.8, skin)


def paint_mouth(pen, face, head):
    """A curve from frown to smile; when open it shows teeth and tongue."""
    half = 7.2
    x = np.linspace(-half, half, 25)
    bow = (x / half) ** 2
    line = 13.4 + face.smile * 4.4 * (0.45 - bow)
    gape = max(face.mouth_open, 0) * 5.2
    upper = np.stack([x, line - 0.35 * gape * (1 - bow)], 1)
    lower = np.stack([x, line + 0.65 * gape * (1 - bow)], 1)
    inside = head.on_face(np.concatenate([upper, lower[::-1]]))
    rise = np.stack([0 * x, 1.8 * (1 - bow ** 2)], 1)
    lips = head.on_face(np.concatenate([upper - 0.75 * rise, lower[::-1] + rise]))
    pen.soft(head.on_face(ellipse(0, lower[12, 1] + 2.6, 4, 1)), "shadow", 0.3, 0.9)
    pen.shape(lips, "lips")
    if gape > 0.8:
        room = pen.mask(inside)
        pen.flat(inside, "mouth")
        pen.flat(head.on_face(ellipse(0, lower[12, 1], 4, 0.36 * gape)), "tongue", room)
        teeth = np.concatenate([upper - 1, upper[::-1] + (0, 0.42 * gape)])
        pen.flat(head.on_face(teeth), "teeth", room)
    else:
        pen.stroke(head.on_face(upper), "mouth", 1.1)


def paint_nose(pen, face, head, skin):
    """A ridge and a round tip that stand out from the face."""
    w, tip = 3.1 + 1.2 * face.nose_width, 7.0 + 1.7 * face.nose_length
    away = -1 if pen.light_side > 0 else 1
    side = [(0, 0), (away * 1.8, 1), (away * (w + 1.1), tip), (away * w, tip + 1), (0, tip)]
    pen.soft(head.on_face(side, 3), "shadow", 0.5, 0.9, skin)
    pen.soft(head.on_face(ellipse(0, tip + 1.5, w * 0.95, 1.2), 3), "shadow", 0.8, 0.7, skin)
    pen.nose(head.on_face(ellipse(0, tip - 0.5, w, 2.3), 3.4))
    pen.soft(head.on_face(ellipse(-away * 0.5, tip - 1.2, 1.1, 1), 3.6), "glint", 0.5, 0.6)


def eye_centers(face):
    """The left and the right eye on the face."""
    offset = 7.3 + 1.2 * face.eye_spacing
    return (-offset, 1.8), (offset, 1.8)


def paint_eyes(pen, face, head, skin):
    """White, iris, pupil, glint and upper lid; the iris shows where the face looks."""
    rx, ry = 4.4 + 0.9 * face.eye_size, 3.3 + 0.9 * face.eye_size
    iris = 0.74 * ry
    for x, y in eye_centers(face):
        white = head.on_face(ellipse(x, y, rx, ry))
        pen.flat(white, "eye")
        room = pen.mask(white)
        gx, gy = x + face.gaze_x * (rx - iris) * 0.95, y + face.gaze_y * (ry - iris) * 1.5
        pen.iris(head, gx, gy, iris, room)
        lid = ellipse(x, y, rx, ry, n=48)[24:] - (0, 0.1)
        under = np.concatenate([lid, lid[::-1] + (0, 1.4)])
        pen.soft(head.on_face(under), "shadow", 0.4, 0.5, room)
        pen.stroke(head.on_face(lid), "lash", 1.0)


def paint_brows(pen, face, head):
    """Two tapered bars whose slope runs from angry to worried."""
    y = -5.0 - 1.3 * face.brow_height
    thick = 1.15 + 0.45 * face.brow_weight
    for side, (x, _) in zip((-1, 1), eye_centers(face)):
        t = np.linspace(-1, 1, 9)
        mid = np.stack([x + side * t * 4.6, y + 1.7 * face.brow_angle * t - 0.9 * (1 - t * t)], 1)
        half = np.stack([0 * t, thick * (1 - 0.45 * (t + 1) / 2)], 1)
        pen.flat(head.on_face(np.concatenate([mid - half, (mid + half)[::-1]])), "brow")


def paint_glasses(pen, face, head):
    """Two rims centred on the eyes, a bridge, and arms that reach for the ears."""
    if face.glasses == "none":
        return
    (left, y), (right, _) = eye_centers(face)
    rx, ry, power = (6.1, 6.1, 2) if face.glasses == "round" else (6.3, 5.0, 6)
    rx = min(rx, right - 0.7)
    for x in (left, right):
        rim = head.on_face(ellipse(x, y + 0.3, rx, ry, power), 1.5)
        shine = ellipse(x + 2.5 * pen.light_side, y - 2, 2.2, 1.8)
        pen.soft(rim, "lens", 0.1, 0.4)
        pen.soft(head.on_face(shine, 1.5), "lens", 0.25, 0.8, pen.mask(rim))
        pen.stroke(rim, "rim", 1.45, closed=True)
        side = np.sign(x)
        arm = head.on_face([(x + side * rx, y - 0.6), (side * head.width, y - 0.8)], 1.5)
        pen.stroke(arm, "rim", 1.2)
    bridge = smooth([(left + rx, y), (0, y - 1.6), (right - rx, y)])
    pen.stroke(head.on_face(bridge, 1.8), "rim", 1.2)


# ---------------------------------------------------------------- a house from the same factors

# The roof's outline: (x as a share of the house's width, y as a share of the roof's height).
ROOFS = {
    "bald": [(-1, 0), (-1, 0.3), (1, 0.3), (1, 0)],
    "short": [(-1.1, 0), (0, 0.7), (1.1, 0)],
    "side": [(-1.1, 0), (-1.1, 1), (1.1, 0.25), (1.1, 0)],
    "fringe": [(-1.15, 0), (-0.6, 0.85), (0.6, 0.85), (1.15, 0)],
    "long": [(-1.38, -0.55), (0, 1.2), (1.38, -0.55)],
    "curly": [(1.12 * np.cos(a), 0.95 * np.sin(a)) for a in np.linspace(np.pi, 0, 24)],
    "bun": [(-1.1, 0), (-0.3, 0.6), (-0.3, 1.1), (0, 1.4), (0.3, 1.1), (0.3, 0.6), (1.1, 0)],
}


def rectangle(x, y, rx, ry):
    """A closed rectangle round a centre."""
    return np.array([(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)])


def paint_house(pen, face):
    """A house: the hair is its roof, the eyes are windows, the mouth is the door."""
    head = Head(face)
    width, eaves, base = head.width - 2.2, -6 - 2 * face.head_length, 18.0
    pen.background()
    hill = [(-20, 90), (-20, 54), (20, 51), (44, 51), (84, 54), (84, 90)]
    pen.shape(smooth(hill, True), "grass")

    def at(points):
        """From the front of the house, pushed aside by its visible side, to the picture."""
        return head.place(np.asarray(points, float) + (3.5 * face.turn, 0))

    def solid(points, part):
        """A front with a dark side behind it, as long as the house is turned."""
        for step in np.linspace(1, 0, 15):
            pen.flat(at(points + (-7 * face.turn * step, 0)), part + "_side")
        pen.shape(at(points), part)

    stack = rectangle(0.55 * width, eaves - 6 - 2.5 * face.nose_length, 2 + face.nose_width, 6)
    pen.shape(at(stack), "brick")
    foot = width + 1.5 * face.jaw
    solid(np.array([(-width, eaves), (width, eaves), (foot, base), (-foot, base)]), "wall")
    solid(np.array(ROOFS[face.hair_cut]) * (width, -13) + (0, eaves), "roof")
    for side, (x, _) in zip((-1, 1), eye_centers(face)):
        paint_window(pen, face, at, side, 0.9 * x)
    paint_door(pen, face, at, base)
    paint_garden(pen, face)


def paint_window(pen, face, at, side, x):
    """Glasses are a heavy frame, the gaze moves the cross bars, the brow is an awning."""
    y, rx, ry = 1.5, 3.5 + 0.7 * face.eye_size, 3.5 + 0.7 * face.eye_size
    power = 2 if face.glasses == "round" else 12
    edge, frame = (0.7, "frame") if face.glasses == "none" else (1.5, "rim")
    pen.flat(at(ellipse(x, y, rx + edge, ry + edge, power)), frame)
    pane = at(ellipse(x, y, rx, ry, power))
    pen.shape(pane, "glass")
    clip, bar = pen.mask(pane), 0.45
    pen.flat(at(rectangle(x + 0.6 * rx * face.gaze_x, y, bar, ry)), "frame", clip)
    pen.flat(at(rectangle(x, y + 0.6 * ry * face.gaze_y, rx, bar)), "frame", clip)
    top, slope = y - ry - 1.8 - 0.8 * face.brow_height, 1.5 * face.brow_angle * side
    thick = 1.0 + 0.45 * face.brow_weight
    pen.flat(at([(x - rx - 1, top - slope - thick), (x + rx + 1, top + slope - thick),
                 (x + rx + 1, top + slope + thick), (x - rx - 1, top - slope + thick)]), "brow")


def paint_door(pen, face, at, base):
    """A smile is a door with a round top, a frown one with a hollow top; it opens as a mouth."""
    half = 4.8

    def panel(right):
        x = np.linspace(-half, right, 17)
        top = 9.4 - 3.6 * face.smile * (0.5 - (x / half) ** 2)
        return at(np.concatenate([np.stack([x, top], 1), [(right, base), (-half, base)]]))

    pen.stroke(panel(half), "frame", 1.6, closed=True)
    pen.flat(panel(half), "mouth")
    hinge = half - 6.5 * max(face.mouth_open, 0)
    pen.shape(panel(hinge), "door")
    pen.flat(at(ellipse(hinge - 1, 14, 0.6, 0.6)), "frame")
    if face.beard == "moustache":
        porch = [(-8, 9), (-6, 6), (6, 6), (8, 9)]
        pen.shape(at(porch), "roof")


def paint_garden(pen, face):
    """Stubble is a low fence before the house, a full beard a thick hedge."""
    for side in (-1, 1):
        if face.beard == "stubble":
            for x in range(8, 34, 4):
                pen.flat(rectangle(32 + side * x, 54, 1, 3.6), "frame")
            pen.flat(rectangle(32 + side * 20, 54, 13, 0.8), "frame")
        elif face.beard == "full":
            for x, r in ((26, 4.5), (10, 4), (18, 5.5)):
                pen.shape(ellipse(32 + side * x, 54, r, r), "hedge")


# ---------------------------------------------------------------- the module's front door

RECIPES = {"photo": (PhotoPen, paint_face), "emoji": (EmojiPen, paint_face),
           "sketch": (SketchPen, paint_face), "statue": (StatuePen, paint_face),
           "houses": (HousePen, paint_house)}
STYLES = tuple(RECIPES)


def draw(face, style="photo", resolution=64):
    """Draw one Face as a square RGB picture."""
    pen_type, paint = RECIPES[style]
    pen = pen_type(face, resolution)
    paint(pen, face)
    return pen.finish()


def face_of(seed, i):
    """Face i of a seed: the same whatever the style, the number of faces or of workers."""
    return sample_face(np.random.default_rng([seed, i]))


def _draw_chunk(job):
    """Draw a run of faces. Stands at module level so that a worker process can import it."""
    style, seed, start, stop, resolution = job
    return np.stack([np.asarray(draw(face_of(seed, i), style, resolution))
                     for i in range(start, stop)])


def _draw_chunks(style, n, seed, resolution, workers=None):
    """Faces 0..n-1 of a seed in runs of CHUNK, in order, drawn side by side where it pays."""
    workers = workers or os.cpu_count() or 1
    jobs = [(style, seed, start, min(start + CHUNK, n), resolution) for start in range(0, n, CHUNK)]
    if workers == 1 or len(jobs) == 1:
        yield from map(_draw_chunk, jobs)
    else:
        ignore = (signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the process that waits
        with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore) as pool:
            yield from pool.map(_draw_chunk, jobs)


def draw_faces(style, n, seed, resolution=64, workers=None):
    """Faces 0..n-1 of a seed as a uint8 array [n, resolution, resolution, 3].

    Uses all cores, or `workers` processes. These are spawned, so a script that asks for more
    than CHUNK faces must do so under `if __name__ == "__main__":`.
    """
    return np.concatenate(list(_draw_chunks(style, n, seed, resolution, workers)))


def save_faces(style, n, seed, folder, resolution=64):
    """Write faces 0..n-1 of a seed as folder/00000.png, 00001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = _draw_chunks(style, n, seed, resolution)
    for i, picture in enumerate(itertools.chain.from_iterable(chunks)):
        Image.fromarray(picture).save(folder / f"{i:05d}.png")


def contact_sheet(style, seed, resolution):
    """Every style of the same ten people, one style a row; or 8 x 8 faces of one style."""
    rows = [draw_faces(s, 10, seed, resolution) for s in STYLES]
    if style:
        rows = draw_faces(style, 64, seed, resolution).reshape(8, 8, resolution, resolution, 3)
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows]))


def whole(low, high):
    """An argparse type: a whole number in low..high."""
    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low}..{high}")
        return int(text)
    return parse


class OneLineParser(argparse.ArgumentParser):
    """Argparse without the usage text: a mistake is told in one line."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_arguments(argv=None):
    """The command line, and the parser for telling later mistakes in its way."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--style", choices=STYLES, help="default: photo; all styles on a --sheet")
    parser.add_argument("--n", type=whole(1, 10**6), default=64, help="faces; default: 64")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=1, help="people; default: 1")
    parser.add_argument("--resolution", type=whole(32, 256), default=64,
                        help="pixels along a side, 32..256; default: 64")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--out", type=Path, metavar="DIR", help="write n faces into this folder")
    job.add_argument("--sheet", type=Path, metavar="FILE.png", help="write one contact sheet")
    job.add_argument("--ten-shot", action="store_true", help="write the sets data/10shot*")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_arguments(argv)
    try:
        if args.ten_shot:
            for style, folder in TEN_SHOT_FOLDERS.items():
                save_faces(style, 10, TEN_SHOT_SEED, Path(__file__).parent / folder)
        elif args.sheet:
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(args.style, args.seed, args.resolution).save(args.sheet)
        else:
            save_faces(args.style or "photo", args.n, args.seed, args.out, args.resolution)
    except (OSError, ValueError) as problem:    # a folder that can't be written, a wrong ending
        parser.error(str(problem))
    except KeyboardInterrupt:
        parser.exit(1, f"{parser.prog}: stopped\n")


if __name__ == "__main__":
    main()
