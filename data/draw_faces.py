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
from contextlib import closing
from dataclasses import dataclass, field, fields
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from PIL.ImageColor import getrgb as rgb    # from "#rrggbb" to three numbers of 0..255

FRAME = 64          # geometry is written in pixels of a 64 x 64 picture, whatever the resolution
SUPERSAMPLE = 4     # shapes are drawn this much larger, then reduced, for smooth edges
HEAD_SIZE = 1.3     # from the units of a head to those of the frame
SKULL = 2.15        # how square the upper half of a head is (2 is an ellipse)
EYE_Y = 1.8         # how far the eyes lie below the middle of the head
MAX_TURN = np.radians(25)
MAX_TILT = np.radians(14)
CHUNK = 250         # faces that a worker process draws before it hands them back

TEN_SHOT_SEED = 2501    # chosen for ten varied people, and unlike the seeds that users type
TEN_SHOT_FOLDERS = {
    "emoji": "10shot", "sketch": "10shot_sketch",
    "statue": "10shot_statue", "houses": "10shot_houses"}


# ---------------------------------------------------------------- the factors of a face

def between(low, high):
    """A factor drawn evenly from low..high."""
    return field(metadata={"draw": lambda rng: float(rng.uniform(low, high))})


def one_of(**odds):
    """A factor that takes one of the given names, with the given odds."""
    names = list(odds)
    shares = np.array(list(odds.values())) / sum(odds.values())
    return field(metadata={"draw": lambda rng: names[rng.choice(len(names), p=shares)]})


@dataclass(frozen=True)
class Face:
    """Every factor is drawn on its own: knowing one says nothing about another."""
    skin: float = between(0, 1)            # palest .. darkest
    hair_color: float = between(0, 1)      # black, brown, ginger, blond .. white
    hair_dye: str = one_of(none=86, pink=5, blue=5, green=4)
    hair_cut: str = one_of(bald=9, short=17, side=16,
                           fringe=16, long=16, curly=14, bun=12)
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


def face_of(seed, i):
    """Face i of a seed: the same whatever the style, the number of faces or of workers."""
    rng = np.random.default_rng([seed, i])
    factors = {factor.name: factor.metadata["draw"](rng) for factor in fields(Face)}
    return Face(**factors)


# ---------------------------------------------------------------- colours

def row(text):
    """A row of colours, to pick from."""
    return [rgb(color) for color in text.split()]


WHITE = rgb("#ffffff")
BLACK = rgb("#000000")
SKIN = row("#ffe2cf #f6cbac #e7b28a #cc9064 #a06744 #784a32 #543426")
HAIR = row("#1e1a20 #3a241e #5c341e #963a1c #d66824 #f0b84c #f4d894 #e2e2e6")
DYE = {"pink": rgb("#ec68a0"), "blue": rgb("#4880de"), "green": rgb("#42b08a")}
EYES = row("#54301a #8a5c24 #468a42 #2e7cd0 #7898b0")
RIMS = row("#14141a #b01c28 #243e96 #14141a")
WALLS = row("#faf0d6 #f6d68c #f0a882 #d66854 #964238 #705c60")
WHEEL = row("#ec5c58 #f69c42 #f6d458 #76c864 #3cbeb6 #4692ec #9270e4 #e66cb8 #ec5c58")


def mix(a, b, t):
    """The colour a share t of the way from a to b."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def pick(colors, t):
    """The colour at position t of 0..1 along a row of colours."""
    place = t * (len(colors) - 1)
    left = min(int(place), len(colors) - 2)
    return mix(colors[left], colors[left + 1], place - left)


# ---------------------------------------------------------------- curves and the head's pose

def curve(x, y):
    """The points of a line, from their x and their y."""
    return np.stack([x, y], 1)


def band(upper, lower):
    """The closed shape between two lines that run in the same direction."""
    return np.concatenate([upper, lower[::-1]])


def mirrored(x, y):
    """A symmetric line, from its points on one side. Those in the middle (x = 0) stay single."""
    half = curve(x, y)
    return band(half, half[half[:, 0] != 0] * (-1, 1))


def smooth(points, closed=False, rounds=3):
    """Round the corners of a line by cutting them off, again and again (Chaikin)."""
    for _ in range(rounds):
        ahead = np.roll(points, -1, axis=0)
        near = 0.75 * points + 0.25 * ahead
        far = 0.25 * points + 0.75 * ahead
        cut = np.stack([near, far], 1).reshape(-1, 2)
        if not closed:      # keep the ends, and drop the two points on the way back to the start
            cut = np.concatenate([points[:1], cut[:-2], points[-1:]])
        points = cut
    return points


def squared(wave, power):
    """A sine or cosine, bent so that a power above 2 squares off the ellipse."""
    return np.sign(wave) * np.abs(wave) ** (2 / power)


def ellipse(x, y, rx, ry, power=2.0, n=36):
    """A closed ellipse; a power above 2 squares it off."""
    angle = np.arange(n) * (2 * np.pi / n)
    x = x + rx * squared(np.cos(angle), power)
    y = y + ry * squared(np.sin(angle), power)
    return curve(x, y)


def rectangle(x, y, rx, ry):
    """A closed rectangle round a centre."""
    left, right = x - rx, x + rx
    top, bottom = y - ry, y + ry
    return curve([left, right, right, left], [top, top, bottom, bottom])


def ribbon(points, width, closed=False):
    """The outline of a line of some width along the points."""
    if closed:      # the ends need their neighbours, for the direction there
        points = np.concatenate([points[-1:], points, points[:2]])
    along = np.gradient(points, axis=0)
    length = np.maximum(np.hypot(*along.T), 1e-6)[:, None]
    across = along[:, ::-1] * (-1, 1) / length * width / 2
    if closed:
        points, across = points[1:-1], across[1:-1]
    return band(points + across, points - across)


class Head:
    """The head's outline, and the way from a point on the face to a point in the picture.

    Face coordinates have their origin in the middle of the head, x to the right and y down.
    """

    def __init__(self, face):
        self.width = 17.0 + 1.9 * face.head_width
        self.top = 18.6 + 0.8 * face.head_length
        self.chin = 20.0 + 2.0 * face.head_length
        self.jaw = 2.2 + 0.58 * face.jaw
        self.eye_x = 7.3 + 1.2 * face.eye_spacing       # of the eye at the right
        self.turn = face.turn * MAX_TURN
        tilt = face.tilt * MAX_TILT
        c, s = np.cos(tilt), np.sin(tilt)
        self.rotation = np.array([[c, s], [-s, c]])

    def place(self, points):
        """Tilt points of the head's own plane into the picture, round a pivot near the chin."""
        return (points - (0, 9)) @ self.rotation * HEAD_SIZE + (32, 45.5)

    def bend(self, points, lift=0.0):
        """Move face points round the turned head as if on a ball; lift raises them off it."""
        x, y = points.T
        longitude = np.arcsin(np.clip(x / self.width, -1, 1)) + self.turn
        x = self.width * np.sin(np.clip(longitude, -np.pi / 2, np.pi / 2))
        low = y > 0
        height = np.minimum(0.98, np.abs(y) / np.where(low, self.chin, self.top))
        power = np.where(low, self.jaw, SKULL)
        half = self.width * (1 - height ** power) ** (1 / power)    # the head's, at that height
        middle = self.chin_shift(y)
        x = np.clip(x, middle - half, middle + half)
        return curve(x + lift * np.sin(self.turn), y)

    def chin_shift(self, y):
        """How far the turned head's outline has moved sideways at a height."""
        return 10 * np.sin(self.turn) * np.clip(y / self.chin, 0, 1) ** 2

    def on_face(self, points, lift=0.0):
        """From a point on the face to the picture."""
        return self.place(self.bend(points, lift))

    def spot(self, x, y, rx, ry, lift=0.0):
        """An ellipse on the face, as seen in the picture."""
        return self.on_face(ellipse(x, y, rx, ry), lift)

    def rim(self, start, end, grow=0.0, n=40):
        """The outline between two angles (0 = right, 90 = chin, 270 = top), `grow` further out."""
        angle = np.radians(np.linspace(start, end, n))
        low = np.sin(angle) > 0
        power = np.where(low, self.jaw, SKULL)
        x = (self.width + grow) * squared(np.cos(angle), power)
        height = np.where(low, self.chin, self.top)
        y = (height + grow) * squared(np.sin(angle), power)
        return curve(x + self.chin_shift(y), y)


# ---------------------------------------------------------------- the pens: one for each style

@functools.cache
def ball_light(side):
    """A 64 x 64 mask: how much light reaches each point of a ball lit from `side` (-1 or 1)."""
    v, u = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.maximum(np.hypot(u, v), 1e-6)
    squeeze = np.minimum(1, 0.97 / radius)
    u, v = u * squeeze, v * squeeze
    light = side * 0.6 * u - 0.5 * v + 0.62 * np.sqrt(1 - u * u - v * v)
    light = np.clip(0.32 + 0.68 * light, 0, 1)
    return Image.fromarray((255 * light).astype(np.uint8))


def bounds(points, margin=0.0):
    """The upper left and the lower right corner of a box round the points, in whole numbers."""
    low = np.floor(points.min(0) - margin).astype(int)
    high = np.ceil(points.max(0) + margin).astype(int)
    return low, high


def filled(size, points, value=255):
    """A mask of one closed shape."""
    mask = Image.new("L", tuple(size))
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=value)
    return mask


def clipped(mask, box, clip):
    """What a clip leaves of the mask of a box."""
    return ImageChops.multiply(mask, clip.crop(box)) if clip else mask


class PhotoPen:
    """Fills shapes with rounded light and shade; the parts' outlines come from paint_face.

    Points are in units of the 64 x 64 frame, a part is a name in the palette, and a clip is a
    mask from mask() outside which nothing is drawn. Other styles change what each method leaves.
    """

    def __init__(self, face, resolution):
        self.side = resolution * SUPERSAMPLE
        self.scale = self.side / FRAME
        self.colors = self.palette(face)
        self.colors["shine"] = mix(self.colors["hair"], WHITE, 0.55)
        self.size = (self.side, self.side)
        self.canvas = Image.new("RGB", self.size, self.colors["ground"])
        self.draw = ImageDraw.Draw(self.canvas)
        self.light = Image.blend(ball_light(-1), ball_light(1), 0.5 + 0.5 * face.light)
        self.light_side = 1 if face.light > 0 else -1       # 1 is the picture's right

    def palette(self, face):
        """The colour of each part of a face, as in life."""
        skin = pick(SKIN, face.skin)
        hair = DYE.get(face.hair_dye) or pick(HAIR, face.hair_color)
        wheel = pick(WHEEL, face.background)
        light = mix(wheel, WHITE, 0.5)
        middle = mix(wheel, rgb("#5a5a6e"), 0.1)
        dark = mix(wheel, rgb("#181a3c"), 0.6)
        return {
            "ground": pick([light, middle, dark], face.background_depth),
            "clothes": mix(pick(WHEEL, face.clothes), rgb("#282446"), 0.2),
            "skin": skin,
            "blush": mix(skin, rgb("#e24646"), 0.42),
            "shadow": mix(skin, rgb("#460e1e"), 0.6),
            "hair": hair,
            "beard": mix(hair, BLACK, 0.25),
            "brow": mix(hair, BLACK, 0.3),
            "lash": mix(rgb("#281818"), hair, 0.12),
            "lips": mix(skin, rgb("#d03446"), 0.62),
            "mouth": rgb("#5c141e"),
            "teeth": rgb("#faf8f2"),
            "tongue": rgb("#d66064"),
            "eye": rgb("#fafafa"),
            "iris": pick(EYES, face.eye_color),
            "pupil": rgb("#120e12"),
            "glint": WHITE,
            "rim": pick(RIMS, face.glasses_color),
            "lens": rgb("#d6ecff"),
        }

    def mask(self, points):
        """A full-size mask of one closed shape, to clip others by."""
        return filled(self.size, points * self.scale)

    def patch(self, points, clip=None):
        """The smallest box that holds a closed shape, and the shape's mask inside that box."""
        points = points * self.scale
        low, high = bounds(points)
        high += 1
        box = (*low, *high)
        return box, clipped(filled(high - low, points - low), box, clip)

    def background(self):
        """A soft slope of light, brighter on the side the light comes from."""
        slope = self.light.crop((12, 12, 52, 52))       # the ball's middle: no edge to be seen
        slope = slope.resize(self.size, Image.BILINEAR)
        color = self.colors["ground"]
        self.canvas.paste(mix(color, BLACK, 0.25), (0, 0, *self.size))
        self.canvas.paste(mix(color, WHITE, 0.3), mask=slope)

    def shape(self, points, part, clip=None):
        """Fill a closed shape as a solid, rounded body: all in shade, then the light on it."""
        box, mask = self.patch(points, clip)
        color = self.colors[part]
        self.canvas.paste(self.dim(color), box, mask)
        lit = ImageChops.multiply(mask, self.light.resize(mask.size, Image.BILINEAR))
        self.canvas.paste(self.bright(color), box, lit)

    def bright(self, color):
        """A colour in full light: stronger, as far as it can be without changing its hue."""
        gain = min(1.2, 255 / max(color))
        return mix([gain * c for c in color], rgb("#fffaf0"), 0.1)

    def dim(self, color):
        """A colour in the shade, a little warmer."""
        red, green, blue = color
        return int(0.62 * red), int(0.5 * green), int(0.53 * blue)

    def flat(self, points, part, clip=None):
        """Fill a small closed shape with one plain colour."""
        box, mask = self.patch(points, clip)
        self.canvas.paste(self.colors[part], box, mask)

    def stroke(self, points, part, width, closed=False):
        """Draw a line; an open one has round ends."""
        points = points * self.scale
        width = width * self.scale
        color = self.colors[part]
        outline = ribbon(points, width, closed)
        self.draw.polygon(outline.ravel().tolist(), fill=color)
        if not closed:
            r = width / 2 - 0.5
            for x, y in points[[0, -1]]:
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def soft(self, points, part, strength, blur, clip=None):
        """Lay a blurred shape over the picture: shadow, blush, shine."""
        low, high = bounds(points, 2.5 * blur)
        # Blur at two pixels a unit, then enlarge: fast, and after a blur no details are lost.
        mask = filled(2 * (high - low), 2 * (points - low), round(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(2 * blur))
        low = np.rint(low * self.scale).astype(int)
        high = np.rint(high * self.scale).astype(int)
        mask = mask.resize(high - low, Image.BILINEAR)
        box = (*low, *high)
        self.canvas.paste(self.colors[part], box, clipped(mask, box, clip))

    def nose(self, points):
        """The nose's tip, a ball in front of the face."""
        self.shape(points, "skin")

    def iris(self, head, x, y, radius, room):
        """A coloured disc with a pupil and a glint, cut off by the eye's edge."""
        self.flat(head.spot(x, y, radius, radius), "iris", room)
        self.flat(head.spot(x, y, 0.52 * radius, 0.52 * radius), "pupil", room)
        x += 0.4 * radius * self.light_side
        y -= 0.4 * radius
        self.flat(head.spot(x, y, 0.75, 0.75), "glint", room)


class EmojiPen(PhotoPen):
    """Flat colours inside thick dark outlines, with no light and shade at all."""

    def palette(self, face):
        colors = super().palette(face)
        yellow = rgb("#ffce38")
        colors |= dict.fromkeys(["line", "lash", "brow", "lips"], rgb("#34221e"))
        colors |= {"skin": yellow, "ground": WHITE, "mouth": rgb("#54161c")}
        colors["stubble"] = mix(yellow, colors["beard"], 0.45)
        if face.beard == "full":
            colors["lips"] = rgb("#d6463c")     # dark lips would be lost in the beard
        return colors

    def background(self):
        """Plain: the canvas has the right colour from the start."""

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
        self.flat(head.spot(x, y, 0.85 * radius, 0.85 * radius), "pupil", room)


@functools.cache
def hatching(side):
    """A mask of slanted pencil lines, wide enough apart to be seen one by one at 64 pixels."""
    down, across = np.mgrid[:side, :side] / (side / FRAME)
    lines = (across + down) % 4.8 < 1.7
    return Image.fromarray(np.where(lines, 255, 0).astype(np.uint8))


class SketchPen(EmojiPen):
    """Pencil on paper: thin grey outlines, with hatching where a colour or a shade is dark."""

    # The parts with hatching, and how much of their colour lies under the lines.
    hatched = dict(skin=0, stubble=0, hair=0.35, beard=0.35, clothes=0.35)

    def palette(self, face):
        paper = rgb("#f3eee2")
        pencil = rgb("#404046")
        colors = PhotoPen.palette(self, face)       # as in life, not as of an emoji
        darkness = {part: 1 - sum(color) / 765 for part, color in colors.items()}
        colors = {part: mix(paper, pencil, share) for part, share in darkness.items()}
        colors |= dict.fromkeys(["ground", "eye", "teeth", "tongue"], paper)
        colors |= dict.fromkeys(["line", "lips", "lash", "rim", "pupil", "brow"], pencil)
        colors["skin"] = mix(paper, pencil, 0.45)
        colors["stubble"] = mix(colors["beard"], pencil, 0.4)
        return colors

    def stroke(self, points, part, width, closed=False):
        super().stroke(points, part, 0.68 * width, closed)

    def flat(self, points, part, clip=None):
        if part not in self.hatched:
            return super().flat(points, part, clip)
        box, mask = self.patch(points, clip)
        color = self.colors[part]
        tint = mix(self.colors["ground"], color, self.hatched[part])
        self.canvas.paste(tint, box, mask)
        if part == "skin":      # hatched only where the light does not reach
            shade = self.light.point(lambda light: 255 if light < 105 else 0)
            mask = ImageChops.multiply(mask, shade.resize(mask.size))
        self.canvas.paste(color, box, clipped(mask, box, hatching(self.side)))


class StatuePen(PhotoPen):
    """Pale stone under a hard light: one colour, carved edges, blank eyes."""

    def __init__(self, face, resolution):
        super().__init__(face, resolution)
        self.light = self.light.point(lambda light: min(255, max(0, int(1.45 * light) - 84)))

    def palette(self, face):
        tones = dict(
            ground=40, clothes=170, skin=226, blush=224, shadow=26, line=70,
            hair=184, beard=146, brow=140, lash=88, eye=236, glint=255,
            lips=184, mouth=44, teeth=226, tongue=120, rim=92, lens=190)
        return {part: (t, int(0.97 * t), int(0.92 * t)) for part, t in tones.items()}

    def background(self):
        """Plain: the canvas has the right colour from the start."""

    def dim(self, color):
        return tuple(int(0.3 * c) for c in color)

    def shape(self, points, part, clip=None):
        super().shape(points, part, clip)
        if part in ("hair", "beard"):
            self.stroke(points, "line", 0.5, closed=True)

    def iris(self, head, x, y, radius, room):
        """A blank ball, and a shallow dent where an iris would be."""
        self.soft(head.spot(x, y, radius, radius), "shadow", 0.3, 0.7, room)


class HousePen(PhotoPen):
    """The photo's light and shade, with the colours of a street."""

    def palette(self, face):
        colors = super().palette(face)
        walls = pick(WALLS, face.skin)
        return colors | {
            "wall": walls,
            "wall_side": self.dim(walls),
            "roof": colors["hair"],
            "roof_side": self.dim(colors["hair"]),
            "frame": rgb("#faf6ee"),
            "glass": mix(colors["iris"], rgb("#bee2ff"), 0.3),
            "door": colors["clothes"],
            "grass": mix(rgb("#68ac4e"), rgb("#3c785a"), face.clothes),
            "hedge": rgb("#2e703a"),
            "brick": rgb("#92463a"),
        }


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
    shoulders = mirrored([-33, -30, -14], [76, 63, 57])
    pen.shape(smooth(shoulders, closed=True) + (32, 0), "clothes")
    if face.hair_cut in ("long", "curly", "bun"):
        pen.shape(head.place(hair_behind(face, head)), "hair")
    lean = head.place(curve([0], [12]))[0, 0] - 32
    neck = curve([24.5 + lean, 39.5 + lean, 40, 32, 24], [44, 44, 58, 64, 58])
    neck = smooth(neck, closed=True)
    pen.shape(neck, "skin")
    chin = head.place(head.rim(0, 180, 2.5))
    pen.soft(chin, "shadow", 0.6, 1.6, pen.mask(neck))


def hair_behind(face, head):
    """The outline of long hair, curls or a bun, as far as they are seen behind the head."""
    if face.hair_cut == "long":
        w = head.width + 3.2
        ends = mirrored([w, w + 1.2, w + 2.2, w - 5, 0], [-2, 12, 24, 27, 24])
        return np.concatenate([head.rim(180, 360, 3.4), smooth(ends)])
    if face.hair_cut == "curly":
        angle = np.radians(np.linspace(0, 240, 120))
        bumps = 4.6 + 1.5 * np.abs(np.sin(6.75 * angle))
        return head.rim(150, 390, bumps, n=120)
    return ellipse(-2.5 * np.sin(head.turn), -head.top - 3.5, 6.6, 5.6)


def paint_ear(pen, face, head, side):
    """One ear, set a little behind the middle of the head's side; long hair hides it."""
    if face.hair_cut == "long":
        return
    x = head.width * np.sin(side * np.radians(98) + head.turn) + side * 0.8
    hollow = head.place(ellipse(x, 3.2, 1.3, 2.6))
    pen.shape(head.place(ellipse(x, 3, 3, 4.6)), "skin")
    pen.soft(hollow, "shadow", 0.45, 0.7)


def paint_cheeks(pen, head, skin):
    """A blush on both cheeks and a hint of shade in the eye sockets."""
    for side in (-1, 1):
        cheek = head.spot(side * 10, 9, 4, 3)
        socket = head.spot(side * 7.5, 0.5, 5.5, 4.5)
        pen.soft(cheek, "blush", 0.42, 2.2, skin)
        pen.soft(socket, "shadow", 0.22, 1.6, skin)
    chin = head.place(head.rim(50, 130, -1))
    pen.soft(chin, "shadow", 0.16, 2, skin)


def paint_beard(pen, face, head, skin):
    """Stubble (a shadow on the skin), a full beard, or a moustache alone."""
    if face.beard == "stubble":
        pen.soft(beard_edge(head, 0.2), "beard", 0.62, 0.8, skin)
    elif face.beard == "full":
        pen.shape(beard_edge(head, 2.6), "beard")
    elif face.beard == "moustache":
        edge = mirrored([0, 3, 7, 9, 5.5, 0], [9.6, 9.2, 11.2, 14, 12.6, 12])
        edge = smooth(edge, closed=True, rounds=2)
        pen.shape(head.on_face(edge, 1.2), "beard")


def beard_edge(head, length):
    """From cheek to cheek; the length is how far the beard stands out below the chin."""
    w = head.width
    cheeks = mirrored([-w, -0.93 * w, -0.72 * w, -5.5, 0], [1, 6, 10.5, 9.4, 9])
    jaw = head.rim(-3, 183, length * np.sin(np.linspace(0, np.pi, 40)))
    return head.place(np.concatenate([jaw, head.bend(smooth(cheeks))]))


def paint_mouth(pen, face, head):
    """A curve from frown to smile; when open it shows teeth and tongue."""
    half = 7.2
    x = np.linspace(-half, half, 25)
    bow = (x / half) ** 2
    line = 13.4 + face.smile * 4.4 * (0.45 - bow)
    gape = max(face.mouth_open, 0) * 5.2
    upper = curve(x, line - 0.35 * gape * (1 - bow))
    lower = curve(x, line + 0.65 * gape * (1 - bow))
    bottom = lower[12, 1]
    rise = curve(0 * x, 1.8 * (1 - bow ** 2))
    pen.soft(head.spot(0, bottom + 2.6, 4, 1), "shadow", 0.3, 0.9)
    pen.shape(head.on_face(band(upper - 0.75 * rise, lower + rise)), "lips")
    if gape <= 0.8:
        pen.stroke(head.on_face(upper), "mouth", 1.1)
        return
    hole = head.on_face(band(upper, lower))
    room = pen.mask(hole)
    pen.flat(hole, "mouth")
    pen.flat(head.spot(0, bottom, 4, 0.36 * gape), "tongue", room)
    teeth = band(upper - 1, upper + (0, 0.42 * gape))
    pen.flat(head.on_face(teeth), "teeth", room)


def paint_nose(pen, face, head, skin):
    """A ridge and a round tip that stand out from the face."""
    w = 3.1 + 1.2 * face.nose_width
    tip = 7.0 + 1.7 * face.nose_length
    away = -pen.light_side
    ridge = curve([0, away * 1.8, away * (w + 1.1), away * w, 0], [0, 1, tip, tip + 1, tip])
    below = head.spot(0, tip + 1.5, w * 0.95, 1.2, 3)
    shine = head.spot(-away * 0.5, tip - 1.2, 1.1, 1, 3.6)
    pen.soft(head.on_face(ridge, 3), "shadow", 0.5, 0.9, skin)
    pen.soft(below, "shadow", 0.8, 0.7, skin)
    pen.nose(head.spot(0, tip - 0.5, w, 2.3, 3.4))
    pen.soft(shine, "glint", 0.5, 0.6)


def paint_eyes(pen, face, head, skin):
    """White, iris, pupil, glint and upper lid; the iris shows where the face looks."""
    rx = 4.4 + 0.9 * face.eye_size
    ry = 3.3 + 0.9 * face.eye_size
    iris = 0.74 * ry
    gaze_x = face.gaze_x * (rx - iris) * 0.95
    gaze_y = face.gaze_y * (ry - iris) * 1.5
    for side in (-1, 1):
        x = side * head.eye_x
        white = head.spot(x, EYE_Y, rx, ry)
        pen.flat(white, "eye")
        room = pen.mask(white)
        pen.iris(head, x + gaze_x, EYE_Y + gaze_y, iris, room)
        lid = ellipse(x, EYE_Y, rx, ry, n=48)[24:] - (0, 0.1)
        under = band(lid, lid + (0, 1.4))
        pen.soft(head.on_face(under), "shadow", 0.4, 0.5, room)
        pen.stroke(head.on_face(lid), "lash", 1.0)


# The lower edge of the hair on the face, from the right: x (1 is the side of the head) and y.
HAIRLINES = {
    "short": mirrored([1, 0.94, 0.84, 0.5, 0],
                      [3, -3, -9, -11.5, -11]),
    "side": curve([1, 0.95, 0.9, 0.6, 0.1, -0.45, -0.75, -0.92, -1],
                  [3, -2, -6, -6.6, -9, -15, -11, -4, 3]),
    "fringe": mirrored([1, 0.97, 0.94, 0.92, 0.8, 0],
                       [10, 8, 0, -6.8, -7.2, -6.6]),
    "long": mirrored([1, 0.93, 0.86, 0.45, 0],
                     [12, 3, -5, -11, -15]),
    "curly": mirrored([1, 0.9, 0.93, 0.75, 0.7, 0.4, 0.25, 0],
                      [4, -2, -5, -7, -9.5, -9, -11, -9.5]),
    "bun": mirrored([1, 0.93, 0.75, 0],
                    [1, -6, -11, -13.5]),
}
HAIR_DEPTH = {      # how far it stands out from the head
    "short": 2.2, "side": 3.6, "fringe": 3.8, "long": 3.4, "curly": 4.4, "bun": 1.8}
HAIR_START = {"long": 142, "fringe": 150}       # the angle where the hair begins, if not 166


def paint_hair(pen, face, head, skin):
    """The hair on the head: from its outer edge down to the hairline."""
    if face.hair_cut == "bald":
        shine = head.place(ellipse(7 * face.light, -12.5, 5, 2.6))
        pen.soft(shine, "glint", 0.35, 1.8, skin)
        return
    hairline = HAIRLINES[face.hair_cut] * (head.width, 1)
    hairline = head.bend(smooth(hairline, rounds=2))
    start = HAIR_START.get(face.hair_cut, 166)
    along = np.linspace(0, 1, 60)
    ends = np.clip(np.minimum(along, 1 - along) * 9, 0.15, 1)      # thinner towards both ends
    depth = HAIR_DEPTH[face.hair_cut] * ends
    if face.hair_cut == "curly":
        depth += 1.4 * np.abs(np.sin(along * np.pi * 11))
    top = head.rim(start, 540 - start, depth, n=60)
    cap = head.place(np.concatenate([top, hairline]))
    shade = np.concatenate([head.rim(180, 360, -2), hairline])
    pen.soft(head.place(shade + (0, 1.6)), "shadow", 0.5, 1.3, skin)
    pen.shape(cap, "hair")
    upper = head.rim(235, 305, -2.2, n=14)
    lower = head.rim(235, 305, -5.2, n=14)
    shine = head.place(band(upper, lower) + (5 * face.light, 0))
    pen.soft(shine, "shine", 0.5, 1.4, pen.mask(cap))


def paint_brows(pen, face, head):
    """Two tapered bars whose slope runs from angry to worried."""
    t = np.linspace(-1, 1, 9)       # from the inner to the outer end
    y = -5.0 - 1.3 * face.brow_height + 1.7 * face.brow_angle * t - 0.9 * (1 - t * t)
    thick = 1.15 + 0.45 * face.brow_weight
    half = curve(0 * t, thick * (1 - 0.45 * (t + 1) / 2))
    for side in (-1, 1):
        middle = curve(side * head.eye_x + side * t * 4.6, y)
        pen.flat(head.on_face(band(middle - half, middle + half)), "brow")


def paint_glasses(pen, face, head):
    """Two rims centred on the eyes, a bridge, and arms that reach for the ears."""
    if face.glasses == "none":
        return
    sizes = {"round": (6.1, 6.1, 2), "square": (6.3, 5.0, 6)}
    rx, ry, power = sizes[face.glasses]
    rx = min(rx, head.eye_x - 0.7)
    for side in (-1, 1):
        x = side * head.eye_x
        rim = head.on_face(ellipse(x, EYE_Y + 0.3, rx, ry, power), 1.5)
        shine = head.spot(x + 2.5 * face.light, EYE_Y - 2, 2.2, 1.8, 1.5)
        pen.soft(rim, "lens", 0.1, 0.4)
        pen.soft(shine, "lens", 0.25, 0.8, pen.mask(rim))
        pen.stroke(rim, "rim", 1.45, closed=True)
        arm = curve([x + side * rx, side * head.width], [EYE_Y - 0.6, EYE_Y - 0.8])
        pen.stroke(head.on_face(arm, 1.5), "rim", 1.2)
    bridge = smooth(mirrored([rx - head.eye_x, 0], [EYE_Y, EYE_Y - 1.6]))
    pen.stroke(head.on_face(bridge, 1.8), "rim", 1.2)


# ---------------------------------------------------------------- a house from the same factors

ARCH = np.linspace(np.pi, 0, 24)
# The roof's outline: x (1 is the side of the house) and y (1 is the height of a roof).
ROOFS = {
    "bald": mirrored([-1, -1], [0, 0.3]),
    "short": mirrored([-1.1, 0], [0, 0.7]),
    "side": curve([-1.1, -1.1, 1.1, 1.1], [0, 1, 0.25, 0]),
    "fringe": mirrored([-1.15, -0.6], [0, 0.85]),
    "long": mirrored([-1.38, 0], [-0.55, 1.2]),
    "curly": curve(1.12 * np.cos(ARCH), 0.95 * np.sin(ARCH)),
    "bun": mirrored([-1.1, -0.3, -0.3, 0], [0, 0.6, 1.1, 1.4]),
}


def paint_house(pen, face):
    """A house: the hair is its roof, the eyes are windows, the mouth is the door."""
    head = Head(face)
    width = head.width - 2.2
    eaves = -6 - 2 * face.head_length
    base = 18.0
    pen.background()
    hill = mirrored([-52, -52, -12], [90, 54, 51])
    pen.shape(smooth(hill, closed=True) + (32, 0), "grass")

    def at(points):
        """From the front of the house, pushed aside by its visible side, to the picture."""
        return head.place(points + (3.5 * face.turn, 0))

    def solid(points, part):
        """A front with a dark side behind it, as long as the house is turned."""
        for step in np.linspace(1, 0, 15):
            behind = points + (-7 * face.turn * step, 0)
            pen.flat(at(behind), part + "_side")
        pen.shape(at(points), part)

    y = eaves - 6 - 2.5 * face.nose_length
    chimney = rectangle(0.55 * width, y, 2 + face.nose_width, 6)
    pen.shape(at(chimney), "brick")
    foot = width + 1.5 * face.jaw
    front = curve([-width, width, foot, -foot], [eaves, eaves, base, base])
    solid(front, "wall")
    solid(ROOFS[face.hair_cut] * (width, -13) + (0, eaves), "roof")
    for side in (-1, 1):
        paint_window(pen, face, at, side, 0.9 * side * head.eye_x)
    paint_door(pen, face, at, base)
    paint_garden(pen, face)


def paint_window(pen, face, at, side, x):
    """Glasses are a heavy frame, the gaze moves the cross bars, the brow is an awning."""
    y = 1.5
    r = 3.5 + 0.7 * face.eye_size
    power = 2 if face.glasses == "round" else 12
    edge, color = (0.7, "frame") if face.glasses == "none" else (1.5, "rim")
    frame = ellipse(x, y, r + edge, r + edge, power)
    pen.flat(at(frame), color)
    pane = at(ellipse(x, y, r, r, power))
    pen.shape(pane, "glass")
    clip = pen.mask(pane)
    upright = rectangle(x + 0.6 * r * face.gaze_x, y, 0.45, r)
    level = rectangle(x, y + 0.6 * r * face.gaze_y, r, 0.45)
    pen.flat(at(upright), "frame", clip)
    pen.flat(at(level), "frame", clip)
    top = y - r - 1.8 - 0.8 * face.brow_height
    slope = 1.5 * face.brow_angle * side
    thick = (0, 1.0 + 0.45 * face.brow_weight)
    awning = curve([x - r - 1, x + r + 1], [top - slope, top + slope])
    pen.flat(at(band(awning - thick, awning + thick)), "brow")


def paint_door(pen, face, at, base):
    """A smile is a door with a round top, a frown one with a hollow top; it opens as a mouth."""
    half = 4.8

    def panel(right):
        """The door from its left edge to the right one."""
        x = np.linspace(-half, right, 17)
        top = 9.4 - 3.6 * face.smile * (0.5 - (x / half) ** 2)
        foot = [(right, base), (-half, base)]
        return at(np.concatenate([curve(x, top), foot]))

    pen.stroke(panel(half), "frame", 1.6, closed=True)
    pen.flat(panel(half), "mouth")
    edge = half - 6.5 * max(face.mouth_open, 0)
    pen.shape(panel(edge), "door")
    pen.flat(at(ellipse(edge - 1, 14, 0.6, 0.6)), "frame")      # the knob
    if face.beard == "moustache":
        porch = mirrored([-8, -6], [9, 6])
        pen.shape(at(porch), "roof")


def paint_garden(pen, face):
    """Stubble is a low fence before the house, a full beard a thick hedge."""
    for side in (-1, 1):
        if face.beard == "stubble":
            for x in range(8, 34, 4):
                pen.flat(rectangle(32 + side * x, 54, 1, 3.6), "frame")
            pen.flat(rectangle(32 + side * 20, 54, 13, 0.8), "frame")
        elif face.beard == "full":
            for x, r in [(26, 4.5), (10, 4), (18, 5.5)]:
                pen.shape(ellipse(32 + side * x, 54, r, r), "hedge")


# ---------------------------------------------------------------- the module's front door

PENS = {
    "photo": PhotoPen, "emoji": EmojiPen, "sketch": SketchPen,
    "statue": StatuePen, "houses": HousePen}


def draw(face, style="photo", resolution=64):
    """Draw one Face as a square RGB picture."""
    pen = PENS[style](face, resolution)
    paint = paint_house if style == "houses" else paint_face
    paint(pen, face)
    return pen.canvas.reduce(SUPERSAMPLE)


def _draw_chunk(job):
    """Draw a run of faces. Stands at module level so that a worker process can import it."""
    style, seed, numbers, resolution = job
    return np.stack([draw(face_of(seed, i), style, resolution) for i in numbers])


def _draw_chunks(style, n, seed, resolution, workers=None):
    """Faces 0..n-1 of a seed in runs of CHUNK, in order, drawn side by side where it pays."""
    starts = range(0, n, CHUNK)
    runs = [range(n)[start:start + CHUNK] for start in starts]
    jobs = [(style, seed, numbers, resolution) for numbers in runs]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        yield from map(_draw_chunk, jobs)
    else:
        yield from _draw_side_by_side(jobs, workers)


def _draw_side_by_side(jobs, workers):
    """Share the jobs among worker processes. Stop these when no more faces are wanted."""
    ignore = (signal.SIGINT, signal.SIG_IGN)
    others = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore) as pool:
        try:
            # Ctrl-C has to wait here: a process that starts now inherits this, and never gets it.
            if os.name == "posix":
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                results = [pool.submit(_draw_chunk, job) for job in jobs]
            finally:
                if os.name == "posix":
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            while results:
                yield results.pop(0).result()
        except BaseException:       # Ctrl-C or a full disk: do not wait for unfinished faces
            for worker in set(active_children()) - others:
                worker.terminate()
            raise


def draw_faces(style, n, seed, resolution=64, workers=None):
    """Faces 0..n-1 of a seed as a uint8 array [n, resolution, resolution, 3].

    Uses all cores, or `workers` processes. These are spawned, so a script that asks for more
    than CHUNK faces must do so under `if __name__ == "__main__":`.
    """
    return np.concatenate(list(_draw_chunks(style, n, seed, resolution, workers)))


def save_faces(style, n, seed, folder, resolution=64):
    """Write faces 0..n-1 of a seed as folder/00000.png, 00001.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(_draw_chunks(style, n, seed, resolution)) as chunks:
        for i, picture in enumerate(itertools.chain.from_iterable(chunks)):
            Image.fromarray(picture).save(folder / f"{i:05d}.png")


def contact_sheet(style, seed, resolution):
    """Every style of the same ten people, one style a row; or 8 x 8 faces of one style."""
    if style:
        rows = np.split(draw_faces(style, 64, seed, resolution), 8)
    else:
        rows = [draw_faces(style, 10, seed, resolution) for style in PENS]
    return Image.fromarray(np.vstack([np.hstack(row) for row in rows]))


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
    parser.add_argument("--style", choices=PENS, help="default: photo; all styles on a --sheet")
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
        parser.exit(130, f"{parser.prog}: stopped\n")


if __name__ == "__main__":
    main()
