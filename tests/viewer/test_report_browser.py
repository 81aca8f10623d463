"""The report page in headless Chromium: real clicks, keys and pixels. Skipped where there is no browser."""

from __future__ import annotations

import base64
import csv
import io
import re
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from report_cases import AXIAL, PROVENANCE, head_ct, photograph, planted_maps, scan, study

from itemizedclip.evaluation.calibration import Judgement
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import LEAST_PEAK, MIN_SCALE_TOP
from itemizedclip.viewer.files import describe
from itemizedclip.viewer.geometry import Geometry, map_to_input
from itemizedclip.viewer.inputs import InputView, ModelInput, SliceLabels
from itemizedclip.viewer.page.html import described_items, report_html
from itemizedclip.viewer.page.serve import ASK_PATH, ReportServer

pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")

from browser import BROWSER, DRIVER, MISSING, browser, hover, pixels, press
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)

SIZES = [(1280, 800), (390, 844)]
OPACITY, THRESHOLD = 0.75, 1.0  # the page's own at the start


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def show(chromium, tmp_path):
    """Open a report and, at the end, ask that it complained of nothing and asked for nothing but itself."""
    urls = []

    def open_report(explanation, *, width=1280, height=800, scheme="light"):
        path = tmp_path / "report.html"
        path.write_text(report_html(explanation, PROVENANCE), encoding="utf-8")
        urls.append(path.as_uri())
        chromium.open(path.as_uri(), width=width, height=height, scheme=scheme)
        return chromium

    yield open_report
    assert chromium.complaints() == []
    assert set(chromium.requests()) <= set(urls)


# --- reading the screen -----------------------------------------------------------------------------------------------


def set_field(page, field, value):
    """Move a slider or choose an option as a user's hand would leave it."""
    page.run(
        "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
        "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change'));",
        field, str(value),
    )  # fmt: skip
    page.settle()


def without_attention(page, number=0):
    press(page, "o")
    plain = pixels(page, number)
    press(page, "o")
    return plain


def overlay(values, top, *, opacity=OPACITY, threshold=THRESHOLD):
    """Colours (…, 3) and opacity (…) of attention `values`, NaN where the model saw nothing."""
    share = np.clip(np.nan_to_num(values) / top, 0, 1)
    alpha = np.where(np.isnan(values) | (np.nan_to_num(values) < threshold), 0, opacity * np.sqrt(share))
    return colormaps["inferno"](share)[..., :3] * 255, alpha


def mixed(plain, values, top, **options):
    colours, alpha = overlay(values, top, **options)
    return plain * (1 - alpha[..., None]) + colours * alpha[..., None]


def share_of_equal(shown, expected, tolerance=12):
    return (np.abs(shown - expected).max(-1) <= tolerance).mean()


def outline_of(nearest, width=3):
    """Pixels within `width` of the edge of the most attended patch."""
    patch = nearest == np.nanmax(nearest)
    shifts = [(dy, dx) for dy in range(-width, width + 1) for dx in range(-width, width + 1)]
    moved = [np.roll(patch, shift, axis=(0, 1)) for shift in shifts]
    return np.any(moved, axis=0) & ~np.all(moved, axis=0)


def slice_of(page):
    """(current slice, number of slices), both as on the screen."""
    return tuple(int(number) for number in page.text("#slice-label").split(" ", 1)[1].split(" / "))


# --- where the attention appears --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
@pytest.mark.parametrize("mode", ["smooth", "nearest"])
def test_attention_lies_where_map_to_input_puts_it(show, mode, size):
    """The whole canvas of a photograph, pixel by pixel, against the figures' own way back to the picture."""
    explanation = photograph()
    page = show(explanation, width=size[0], height=size[1])
    set_field(page, "upsampling", mode)
    plain, shown = without_attention(page), pixels(page)
    geometry = explanation.source.views[0].geometry.of_resized_input(shown.shape[:2])
    values = map_to_input(explanation.times_uniform(0)[0], geometry, mode)
    top = max(MIN_SCALE_TOP, float(explanation.maps.peaks.max()))
    expected = mixed(plain, values, top)
    assert np.abs(expected - plain).max() > 100
    # Of the pixels that colour or should; but for the outline drawn around the peak.
    coloured = np.abs(expected - plain).max(-1) > 1
    coloured |= np.abs(shown - plain).max(-1) > 1
    coloured &= ~outline_of(map_to_input(explanation.times_uniform(0)[0], geometry))
    assert coloured.sum() > 400
    # The page counts in 255 steps: at the edge where attention is hidden some pixels fall on the other side.
    assert share_of_equal(shown[coloured], expected[coloured]) > 0.93
    errors = {}
    for shift in ((0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)):
        errors[shift] = np.abs(np.roll(shown, shift, (0, 1))[coloured] - expected[coloured]).mean()
    assert errors[0, 0] < 2.5
    assert min(errors, key=errors.__getitem__) == (0, 0)


@pytest.mark.parametrize("plane", [0, 1, 2], ids=["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("affine", [None, AXIAL], ids=["unknown", "oriented"])
def test_planted_spot_of_a_volume_is_brightest_where_it_is(show, plane, affine):
    """In every plane, turned as radiologists look at it: right on the left, the front or the head on top."""
    explanation = scan(spots=((0, 1, 2, 0),), affine=affine)
    view = explanation.source.views[0]
    page = show(explanation)
    page.find_all("#planes button")[plane].click()
    page.settle()
    slice_number = slice_of(page)[0] - 1
    page.run("for (const p of document.querySelectorAll('#presets button')) if (p.textContent === 'Bone') p.click()")
    plain, shown = without_attention(page), pixels(page)
    full = map_to_input(explanation.times_uniform(0)[0], view.geometry, "smooth")
    cut = np.take(full, slice_number, axis=plane)
    # S P L: the head is up, the front is up, the right is left. Only the slices run against the screen.
    if affine is not None and plane > 0:
        cut = cut[::-1]
    changed = np.abs(shown - plain).sum(-1) > 40
    rows, columns = (changed.nonzero()[axis].mean() / shown.shape[axis] for axis in (0, 1))
    strong = np.nan_to_num(cut) > 0.35 * np.nanmax(cut)
    expected_rows, expected_columns = ((strong.nonzero()[axis].mean() + 0.5) / cut.shape[axis] for axis in (0, 1))
    assert rows == pytest.approx(expected_rows, abs=0.07)
    assert columns == pytest.approx(expected_columns, abs=0.07)
    # Proportions follow the voxels' sizes.
    spacing = [s for axis, s in enumerate(view.spacing_mm) if axis != plane]
    proportion = (cut.shape[0] * spacing[0]) / (cut.shape[1] * spacing[1])
    assert shown.shape[0] / shown.shape[1] == pytest.approx(proportion, rel=0.03)


def test_letters_tell_the_directions(show):
    page = show(scan(affine=AXIAL))
    letters = {}
    for button in page.find_all("#planes button"):
        button.click()
        page.settle()
        letters[button.text] = "".join(letter.text for letter in page.find_all(".well .letter"))
    assert letters == {"Axial": "RLAP", "Coronal": "RLSI", "Sagittal": "APSI"}
    page = show(scan())
    assert [button.text for button in page.find_all("#planes button")] == ["Slice", "Row", "Column"]
    assert "".join(letter.text for letter in page.find_all(".well .letter")) == ""


def test_heads_scales_opacity_and_threshold_change_the_picture(show):
    explanation = photograph(spots=((2, 5), (6, 2)))
    explanation.maps.head_weights[1] *= 0.25  # the second item looks less hard
    view, maps = explanation.source.views[0], explanation.maps
    page = show(explanation)
    set_field(page, "upsampling", "nearest")
    page.find_all(".item label")[1].click()
    plain = without_attention(page)
    geometry = view.geometry.of_resized_input(plain.shape[:2])
    averaged = map_to_input(explanation.times_uniform(0)[1], geometry)
    by_head = map_to_input(maps.times_uniform(per_head=True)[1, 1], geometry)
    shared = float(maps.peaks.max())
    own = float(maps.peaks[1])
    assert shared > 2 * own > 2 * MIN_SCALE_TOP
    assert share_of_equal(pixels(page), mixed(plain, averaged, shared)) > 0.96
    set_field(page, "scale", "own")
    assert share_of_equal(pixels(page), mixed(plain, averaged, own)) > 0.96
    assert page.find_all("#ticks span")[2].text == f"{own:.0f}×" if own >= 10 else f"{own:.1f}×"
    set_field(page, "opacity", 30)
    assert share_of_equal(pixels(page), mixed(plain, averaged, own, opacity=0.3)) > 0.96
    set_field(page, "opacity", 75)
    set_field(page, "head", 1)
    assert share_of_equal(pixels(page), mixed(plain, by_head, by_head.max(where=~np.isnan(by_head), initial=0))) > 0.96
    assert f"nowhere {100 * float(maps.head_nowhere[1, 1]):.0f} %" in page.find_all(".item")[1].text
    set_field(page, "head", -1)
    # The lowest values, those of the even rest, are shown once nothing is hidden.
    rest = float(np.nanmin(averaged))
    assert 0.05 < rest < 1
    set_field(page, "threshold", 0)
    assert share_of_equal(pixels(page), mixed(plain, averaged, own, threshold=0), 10) > 0.96
    set_field(page, "threshold", f"{own * 1.1:.1f}")


# --- moving about -----------------------------------------------------------------------------------------------------


def test_choosing_an_item_goes_to_the_series_and_slice_of_its_peak(show):
    explanation = study(spots=((1, 0, 2, 1), (2, 1, 1, 3)))
    page = show(explanation)

    def current():
        return page.find("#tabs [aria-selected=true] .name").text, slice_of(page)

    # Tokens are 8 slices thick: the middle one of the first or the second layer.
    assert current() == ("SERIES_1", (5, 16))
    page.find_all(".item label")[1].click()
    page.wait("document.querySelector('#tab-2').getAttribute('aria-selected') === 'true'")
    page.settle()
    assert current() == ("SERIES_2", (13, 16))
    assert page.text(".pane .title") == "finding 1"
    assert page.text("#readout").startswith("Middle of the peak's patch: slice 13, row 25, column 57 · grey ")
    assert page.text("#readout").endswith(f" · attention {float(explanation.maps.peaks[1]):.2f}×")
    # From the keyboard the same.
    press(page, Keys.ARROW_UP, selector=".item input:checked")
    page.wait("document.querySelector('#tab-1').getAttribute('aria-selected') === 'true'")
    page.settle()
    assert current() == ("SERIES_1", (5, 16))
    assert page.text(".pane .title") == "finding 0"
    press(page, Keys.HOME, "p")
    assert current() == ("SERIES_1", (5, 16))


def test_shares_of_the_series_are_shown(show):
    explanation = study()
    page = show(explanation)
    for item in (0, 1):
        page.find_all(".item label")[item].click()
        page.settle()
        shares = explanation.share_of_views()[item]
        assert [tab.text for tab in page.find_all("#tabs .share")] == [f"{round(100 * float(s))} %" for s in shares]
        numbers = page.find_all(".item")[item].text
        assert f"nowhere {100 * float(explanation.maps.nowhere[item]):.0f} %" in numbers
        assert f"peak {float(explanation.maps.peaks[item]):.0f}×" in numbers
        assert f"{float(explanation.maps.scores[item]):.3f}".replace("-", "−") in numbers


def test_slices_by_keys_wheel_and_slider(show):
    page = show(study())
    assert slice_of(page) == (5, 16)
    moves = [
        (Keys.ARROW_DOWN, 6), (Keys.ARROW_RIGHT, 7), (Keys.ARROW_UP, 6), (Keys.ARROW_LEFT, 5), (Keys.PAGE_DOWN, 10),
        (Keys.PAGE_DOWN, 15), (Keys.PAGE_DOWN, 16), (Keys.PAGE_UP, 11), (Keys.HOME, 1), (Keys.ARROW_UP, 1),
        (Keys.END, 16),
    ]  # fmt: skip
    for key, expected in moves:
        press(page, key)
        assert slice_of(page) == (expected, 16), key
    before = page.run("return scrollY")
    origin = ScrollOrigin.from_element(page.find(".well"))
    ActionChains(page.driver).scroll_from_origin(origin, 0, -120).perform()
    page.wait("document.getElementById('slice').value === '12'")
    assert page.run("return scrollY") == before
    press(page, Keys.ARROW_LEFT, Keys.ARROW_LEFT, selector="#slice")
    assert slice_of(page) == (11, 16)
    assert page.find("#slice").get_attribute("aria-valuetext") == "11 of 16"
    assert page.find(".well canvas").get_attribute("aria-label").startswith("SERIES_1, Slice 11 of 16; attention of:")


def test_series_by_keys_keep_the_slice(show):
    page = show(study())
    press(page, Keys.END)
    press(page, Keys.ARROW_RIGHT, selector="#tab-1")
    page.wait("document.activeElement.id === 'tab-2'")
    page.settle()
    assert slice_of(page) == (16, 16)
    assert [tab.get_attribute("tabindex") for tab in page.find_all("[role=tab]")] == ["-1", "-1", "0"]
    press(page, Keys.ARROW_RIGHT, selector="#tab-2")
    page.wait("document.activeElement.id === 'tab-0'")
    assert page.find("#series-panel").get_attribute("aria-labelledby") == "tab-0"


def test_hover_reads_the_voxel_its_value_and_its_attention(show):
    explanation = scan()
    view = explanation.source.views[0]
    page = show(explanation)
    slice_number = slice_of(page)[0] - 1
    values = map_to_input(explanation.times_uniform(0)[0], view.geometry, "nearest")
    seen = 0
    for x, y in ((0.5, 0.5), (0.2, 0.82), (0.01, 0.5), (0.95, 0.1)):
        text = hover(page, x, y)
        place, value, attention = text.split(" · ")
        numbers = [int(word.strip(",")) - 1 for word in place.split() if word.strip(",").isdigit()]
        assert numbers[0] == slice_number
        assert numbers[1] == pytest.approx(y * 50, abs=1)
        assert numbers[2] == pytest.approx(x * 60, abs=1)
        assert value == f"{view.values[tuple(numbers)]} HU".replace("-", "−")
        expected = values[tuple(numbers)]
        assert attention == ("not seen by the model" if np.isnan(expected) else f"attention {expected:.2f}×")
        seen += not np.isnan(expected)
    assert seen == 2


def test_hover_over_a_photograph_reads_its_colour(show):
    page = show(photograph())
    assert "RGB 90 90 90" in hover(page, 0.5, 0.5)


def test_windows_of_hounsfield_units(show):
    explanation = scan(spots=((0, 1, 1, 1),))
    values = explanation.source.views[0].values
    page = show(explanation)
    press(page, "o")
    middle = slice_of(page)[0] - 1

    def expected(low, high):
        grey = np.clip(np.rint((values[middle] - low) * 255.0 / (high - low)), 0, 255)
        return grey[2::5, 2::5]

    def shown():
        """Centres of the tiles, where interpolation does not reach."""
        drawn = pixels(page)[..., 0]
        rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip((10, 12), drawn.shape))
        return drawn[rows][:, columns]

    def agreement(low, high):
        return (np.abs(shown() - expected(low, high)) < 4).mean()

    assert agreement(-1150, 350) > 0.9
    presets = {button.text: button for button in page.find_all("#presets button")}
    assert list(presets)[:4] == ["As the model", "Lung", "Mediastinum", "Bone"]
    presets["Mediastinum"].click()
    assert agreement(-160, 240) > 0.9 > agreement(-1150, 350)
    assert page.text("#level-value") == "40 HU"
    # Drag: down raises the level, sideways changes the width.
    canvas = page.find(".well canvas")
    ActionChains(page.driver).move_to_element(canvas).click_and_hold().move_by_offset(60, 30).release().perform()
    page.settle()
    assert page.text("#level-value") == "80 HU"
    assert page.text("#width-value") == "480 HU"
    assert page.find_all("#presets [aria-pressed=true]") == []
    assert agreement(-160, 320) > 0.9
    ActionChains(page.driver).double_click(canvas).perform()
    assert agreement(-1150, 350) > 0.9
    set_field(page, "level", 100)
    set_field(page, "width", 1000)
    assert agreement(-400, 600) > 0.9


def test_windows_of_one_series_are_one_tab_with_an_attention_each(show):
    explanation = head_ct()
    page = show(explanation)
    shares = explanation.share_of_views()[0]
    assert [name.text for name in page.find_all("#tabs .name")] == ["HEAD_AX", "AX_T2_FLAIR"]
    # The first item peaks in the bone window.
    assert page.text("#seen-chips [aria-pressed=true]").startswith("Bone ")
    assert page.text("#level-value") == "600 HU"
    assert page.find_all("#tabs .share")[0].text == f"{100 * float(shares[:3].sum()):.0f} %"
    assert [button.text.split(" ", 1)[1] for button in page.find_all("#seen-chips button")] == [
        f"{100 * float(share):.0f} %" for share in shares[:3]
    ]
    presets = {button.text: button for button in page.find_all("#presets button")}
    assert list(presets) == ["As the model", "Brain", "Subdural", "Stroke", "Bone", "Blood", "Full range"]
    coloured = (np.abs(pixels(page) - without_attention(page)).max(-1) > 40).sum()
    assert coloured > 100
    # A window the model did not see keeps the attention, one that it saw brings its own.
    presets["Stroke"].click()
    page.settle()
    assert page.text("#level-value") == "40 HU"
    assert page.text("#width-value") == "40 HU"
    assert page.text("#seen-chips [aria-pressed=true]").startswith("Bone ")
    assert (np.abs(pixels(page) - without_attention(page)).max(-1) > 40).sum() > 100
    page.find_all("#presets button")[1].click()
    page.settle()
    assert page.text("#seen-chips [aria-pressed=true]").startswith("Brain ")
    assert (np.abs(pixels(page) - without_attention(page)).max(-1) > 40).sum() == 0
    page.find_all("#seen-chips button")[0].click()
    page.settle()
    assert (page.text("#level-value"), page.text("#width-value")) == ("80 HU", "200 HU")
    page.find_all("#tabs button")[1].click()
    page.settle()
    assert not page.find("#seen").is_displayed()


@pytest.mark.parametrize("width", [1280, 390])
def test_tabs_show_what_tells_long_names_apart(show, width):
    explanation = study()
    stem = "AX_DWI_EPI_TRACE_WEIGHTED_3_SCAN_TRACE_RESOLVE_FS_SMS2_ISO_b"
    for number, view in enumerate(explanation.source.views):
        explanation.source.views[number] = replace(view, name=f"{stem}{number}")
    page = show(explanation, width=width, height=800)
    assert (
        page.run(
            "return [...document.querySelectorAll('#tabs button, #tabs .name')].filter("
            "e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1 && e.className !== 'name')"
            ".map(e => e.outerHTML)"
        )
        == []
    )
    assert [tab.get_attribute("textContent") for tab in page.find_all("#tabs .name")] == [
        f"{stem}{number}" for number in range(3)
    ]


def test_a_nearly_even_map_says_so_instead_of_colours(show):
    explanation = study(affine=AXIAL)
    even, total = explanation.maps.head_weights[1], explanation.maps.head_weights[1, 0].numel()
    even[:] = 0.8 / total
    even[:, 2, 1, 1, 3] *= 2.4  # 1.92× an even spread, below the bound
    assert 1.9 < float(explanation.maps.peaks[1]) < LEAST_PEAK
    page = show(explanation)
    assert page.text("#slice-note") == "slice of the peak"
    assert len(page.find_all("#profile .peak")) == 1
    assert "no localisation" not in page.find_all(".item")[0].text
    press(page, Keys.END)
    assert page.text("#slice-note") == ""
    page.find_all(".item label")[1].click()
    page.settle()
    assert "no localisation" in page.find_all(".item")[1].text
    assert page.text(".even-note").startswith("No localisation")
    assert page.find_all("#profile .peak") == []
    set_field(page, "threshold", 0)
    np.testing.assert_array_equal(pixels(page), without_attention(page))
    page.find("#even").click()
    assert (pixels(page) != without_attention(page)).mean() > 0.9
    assert "A score is no probability" in page.text(".items")


def test_places_in_mm_and_the_same_place_in_another_series(show):
    explanation = head_ct(spots=((1, 1, 3, 0),))
    views = explanation.source.views
    labels = SliceLabels(0, tuple(f"series 4 · image {n + 1} · S {3.0 * n:.1f} mm" for n in range(12)))
    for number in range(3):
        views[number] = replace(views[number], frame="1.2", slice_labels=labels)
    # The MRI of the same frame has half as many slices of twice the thickness, from 6 mm higher up.
    thick = views[3].affine.copy()
    thick[2] = [6.0, 0, 0, 7.5]
    values = np.full((6, 40, 40), 90, dtype=np.uint8)
    views[3] = replace(views[3], values=values, geometry=Geometry.of_input(values.shape), affine=thick, frame="1.2",
                       spacing_mm=(6.0, 0.8, 0.8))  # fmt: skip
    page = show(explanation)
    assert slice_of(page) == (5, 12)
    assert page.text("#slice-note") == "slice of the peak · series 4 · image 5 · S 12.0 mm"
    text = hover(page, 0.5, 0.5)
    row, column = (int(re.search(rf"{word} (\d+)", text)[1]) - 1 for word in ("row", "column"))
    world = views[0].affine @ [4, row, column, 1]
    assert f"L {-world[0]:.1f} P {-world[1]:.1f} S {world[2]:.1f} mm" in text
    assert "image 5" in text
    # 12 mm is nearest the slice at 13.5 mm (10.5 … 16.5), the second.
    page.find_all("#tabs button")[1].click()
    page.settle()
    assert slice_of(page) == (2, 6)
    page.find_all("#tabs button")[0].click()
    page.settle()
    assert slice_of(page) == (5, 12)
    press(page, Keys.HOME)
    page.find_all("#tabs button")[1].click()
    page.settle()
    assert slice_of(page) == (1, 6)
    assert "does not reach" in page.text("#readout")
    # 32 mm across: a third of that is at most 1 cm.
    assert page.text(".scale") == "1 cm"
    widths = page.find(".scale").rect["width"], page.find(".well canvas").rect["width"]
    assert widths[0] / widths[1] == pytest.approx(10 / 32, abs=0.02)


def saved_by(page, selector):
    """(name, bytes) of the file that a click on a button hands to the browser."""
    page.run(
        "window.saved = null; const make = URL.createObjectURL; URL.createObjectURL = (blob) => {"
        "  const url = make(blob); URL.createObjectURL = make;"
        "  const reader = new FileReader(); reader.onload = () => (window.saved = [name, reader.result]);"
        "  let name; addEventListener('click', (event) => { name = event.target.download; event.preventDefault();"
        "  reader.readAsDataURL(blob); }, { capture: true, once: true }); return url; }"
    )
    page.find(selector).click()
    page.wait("window.saved")
    name, data = page.run("return window.saved")
    return name, base64.b64decode(data.split(",")[1])


def test_table_of_findings(show):
    explanation = head_ct(items=['=a "finding", and more', "even"])
    explanation.maps.head_weights[1] = 0.8 / explanation.maps.head_weights[1, 0].numel()
    page = show(explanation)
    name, data = saved_by(page, "#save-table")
    assert name == "HEAD.csv"
    first, second = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert first["text"] == '\'=a "finding", and more'
    assert float(first["tcsim"]) == pytest.approx(0.6, abs=1e-6)
    assert float(second["tcsim"]) == pytest.approx(-0.1, abs=1e-6)
    peak = describe(explanation)["items"][0]["peak"]
    assert (first["peak_series"], first["peak_window"]) == ("HEAD_AX", "Bone")
    assert [int(first[key]) - 1 for key in ("slice", "row", "column")] == peak["slice_row_column"]
    written = [float(first[key]) for key in ("mm_right", "mm_front", "mm_head")]
    np.testing.assert_allclose(written, peak["world_mm_ras"], atol=0.051)
    assert [row["is_localised"] for row in (first, second)] == ["yes", "no"]
    assert second["slice"] == second["peak_series"] == ""
    shares = [float(value) for key, value in first.items() if key.startswith("share_")]
    np.testing.assert_allclose(shares, explanation.share_of_views()[0], atol=1e-4)


def test_picture_of_the_view(show, tmp_path):
    page = show(study(affine=AXIAL))
    page.find_all(".compare")[1].click()
    shown = [pixels(page, k) for k in (0, 1)]
    name, data = saved_by(page, "#save-picture")
    assert name == "STUDY7.png"
    (tmp_path / "saved.png").write_bytes(data)
    saved = np.asarray(Image.open(tmp_path / "saved.png").convert("RGB")).astype(int)
    height, width, _ = shown[0].shape
    assert saved.shape[1] == 2 * width + 24
    for k, picture in enumerate(shown):
        found = saved[8 : 8 + height, 8 + k * (width + 8) : 8 + k * (width + 8) + width]
        # Equal but for the letters and the scale bar, which are drawn over it.
        assert 0.95 < (found == picture).all(-1).mean() < 1
    assert (saved[height + 16 :].max(-1) > 150).sum() > 300  # the lines of text below


def test_large_volumes_are_shown_to_the_step(show, monkeypatch):
    monkeypatch.setattr("itemizedclip.viewer.page.html.MOST_EXACT_VOXELS", 1000)
    explanation = scan()
    values = explanation.source.views[0].values
    page = show(explanation)
    middle = slice_of(page)[0] - 1
    for x, y in ((0.5, 0.5), (0.2, 0.8), (0.7, 0.3), (0.9, 0.1)):
        text = hover(page, x, y)
        found = int(re.search(r"about (−?\d+) HU", text)[1].replace("−", "-"))
        row, column = (int(re.search(rf"{word} (\d+)", text)[1]) - 1 for word in ("row", "column"))
        value = int(values[middle, row, column])
        assert abs(found - value) <= (2 if -200 <= value < 300 else 7 if -950 <= value < -200 else 19)
    assert "HU rounded" in page.find("#notes").get_attribute("textContent")


def test_crosshair_links_the_planes(show):
    page = show(study(affine=AXIAL))
    page.find("#cross").click()
    canvas = page.find(".well canvas")
    box = canvas.rect
    # A quarter from the left and from the top: column 16 and row 16 of 64, toward the patient's right and front.
    ActionChains(page.driver).move_to_element_with_offset(
        canvas, round(-0.25 * box["width"]) + 2, round(-0.25 * box["height"]) + 2
    ).click().perform()
    page.settle()
    upright, level = (page.find(f".cross.{way}").rect for way in ("upright", "level"))
    assert (upright["x"] - box["x"]) / box["width"] == pytest.approx(0.25, abs=0.02)
    assert (level["y"] - box["y"]) / box["height"] == pytest.approx(0.25, abs=0.02)
    assert page.text("#level-value") == "142"  # the window stays
    planes = {button.text: button for button in page.find_all("#planes button")}
    planes["Coronal"].click()
    page.settle()
    assert slice_of(page) == (17, 64)
    planes["Sagittal"].click()
    page.settle()
    assert slice_of(page) == (17, 64)
    page.find("#cross").click()
    page.settle()
    assert not page.find(".cross").is_displayed()


def drag(page, start, end):
    """Press the mouse at a place of the canvas, given in shares of it, and let go at another."""
    canvas = page.find(".well canvas")
    box = canvas.rect
    (x, y), (to_x, to_y) = (
        [round((at - 0.5) * box[side]) for at, side in zip(place, ("width", "height"))] for place in (start, end)
    )
    chain = ActionChains(page.driver).move_to_element_with_offset(canvas, x, y).click_and_hold()
    chain.move_by_offset(to_x - x, to_y - y).release().perform()
    page.settle()


def length_of_ruler(page):
    return float(re.search(r"Ruler: ([\d.]+) mm", page.text("#ruler-text"))[1])


def test_ruler_measures_mm(show):
    page = show(study(affine=AXIAL))
    assert not page.find("#ruler-note").is_displayed()
    page.find("#ruler").click()
    before = pixels(page)
    # 64 columns and rows of 0.8 mm: half of each.
    drag(page, (0.25, 0.25), (0.75, 0.75))
    assert length_of_ruler(page) == pytest.approx(np.hypot(25.6, 25.6), abs=0.4)
    yellow = np.abs(pixels(page) - [255, 216, 77]).max(-1) < 40
    assert yellow.sum() > 200
    rows, columns = np.nonzero(yellow)
    size = np.array(before.shape[:2])
    assert [rows.min() / size[0], columns.min() / size[1]] == pytest.approx([0.25, 0.25], abs=0.05)
    assert page.text("#level-value") == "142"  # the window stays
    # In another plane its pixels are of another size: 16 slices of 3 mm from top to bottom.
    page.find_all("#planes button")[1].click()
    page.settle()
    drag(page, (0.5, 0.25), (0.5, 0.75))
    assert length_of_ruler(page) == pytest.approx(24, abs=0.4)
    press(page, Keys.HOME)  # another slice shows the number, not the line
    assert (np.abs(pixels(page) - [255, 216, 77]).max(-1) < 40).sum() == 0
    page.find("#ruler-away").click()
    page.settle()
    assert not page.find("#ruler-note").is_displayed()


def test_crosshair_and_ruler_by_keys(show):
    page = show(study(affine=AXIAL))
    first, count = slice_of(page)
    press(page, "c")
    assert page.find("#cross").is_selected()
    start = page.find(".cross.upright").rect["x"]
    press(page, "m")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT * 20).key_up(Keys.SHIFT).perform()
    page.settle()
    voxel = page.find(".well canvas").rect["width"] / 64
    assert page.find(".cross.upright").rect["x"] - start == pytest.approx(20 * voxel, abs=1.5)
    assert "mm" in page.text("#readout")
    assert page.find("#readout").get_attribute("aria-live") == "polite"
    assert "press M at the other" in page.text("#ruler-text")
    press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN, "m")
    assert slice_of(page) == (first + 2, count)
    assert length_of_ruler(page) == pytest.approx(np.hypot(20 * 0.8, 2 * 3.0), abs=0.1)
    assert "from one slice to another" in page.text("#ruler-text")
    press(page, "c")
    assert not page.find(".cross").is_displayed()


def test_opposite_items_are_read_against_each_other(show):
    texts = ["Pleural effusion.", "a mass", "There is no pleural effusion", "nodule", "no nodules", "mass is not seen"]
    page = show(study(spots=[(0, 0, 0, 0)] * 6, items=texts))
    scores = np.linspace(0.6, -0.1, 6)
    shown = [row.text for row in page.find_all(".item")]
    assert [texts.index(text) for text in (row.split("\n")[1] for row in shown)] == [0, 2, 1, 5, 3, 4]
    assert f"{scores[0] - scores[2]:.3f} above its opposite, item 3" in shown[0]
    assert f"{scores[0] - scores[2]:.3f} below its opposite, item 1" in shown[1]
    assert f"{scores[1] - scores[5]:.3f} above its opposite, item 6" in shown[2]
    assert "opposite" not in shown[4] + shown[5]
    _, data = saved_by(page, "#save-table")
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert [row["opposite_item"] for row in rows] == ["3", "6", "1", "", "", "2"]
    assert float(rows[2]["above_opposite"]) == pytest.approx(scores[2] - scores[0], abs=1e-5)


def test_calibrated_scores_say_where_they_stand(chromium, tmp_path):
    judgement = Judgement(0.31, 0.42, ("present",), {0.9: True}, {0.9: 0.25}, {"present": 0.35, "absent": 0.93})
    html = report_html(study(), PROVENANCE, judgements=[judgement, None])
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    chromium.open((tmp_path / "report.html").as_uri())
    first, second = chromium.find_all(".item")
    assert (
        "Calibrated score 0.310: present, probability 42 % where it was calibrated; reaches 0.250, which 90 % of "
        "studies with it reach; higher than 93 % of studies without it; higher than 35 % of studies with it."
    ) in first.text.replace("\u00a0", " ")
    assert "alibrated" not in second.text
    line, mark = (
        first.find_element("css selector", ".rail .line").rect,
        first.find_element("css selector", ".rail i").rect,
    )
    assert (mark["x"] + 1.5 - line["x"]) / line["width"] == pytest.approx(0.93, abs=0.02)
    _, data = saved_by(chromium, "#save-table")
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert [row["conformal_set"] for row in rows] == ["present", ""]
    assert chromium.complaints() == []


def test_windows_with_values_of_their_own_are_one_tab(show):
    """Head CT as the benchmarks have it: three files of grey values."""
    explanation = study(affine=AXIAL)
    views = explanation.source.views
    for number, window in enumerate(("Blood", "Bone", "Brain")):
        views[number] = replace(views[number], name=f"HEAD_AX_{window}Window", window_of="one folder")
    page = show(explanation)
    assert not page.find("#tabs").is_displayed()
    assert [button.text.split(" ")[0] for button in page.find_all("#seen-chips button")] == ["Blood", "Bone", "Brain"]
    bone = int(re.search(r"grey (\d+)", hover(page, 0.5, 0.5))[1])
    page.find_all("#seen-chips button")[2].click()
    page.settle()
    assert page.text("#seen-chips [aria-pressed=true]").startswith("Brain")
    assert (int(re.search(r"grey (\d+)", hover(page, 0.5, 0.5))[1]) - bone) % 256 == 10  # `study` adds 10 to each


# --- two items --------------------------------------------------------------------------------------------------------


def test_two_items_side_by_side_share_slice_and_series(show):
    explanation = study(spots=((1, 0, 2, 1), (1, 0, 0, 3), (2, 1, 1, 1)))
    page = show(explanation)
    set_field(page, "upsampling", "nearest")
    page.find_all(".compare")[1].click()
    page.settle()
    assert [title.text for title in page.find_all(".pane .title")] == ["A finding 0", "B finding 1"]
    first, second = (pixels(page, k) for k in (0, 1))
    assert first.shape == second.shape
    plain = [without_attention(page, k) for k in (0, 1)]
    np.testing.assert_array_equal(plain[0], plain[1])
    # Token (2, 1) of 4 × 4 is at 0.625, 0.375; token (0, 3) at 0.125, 0.875.
    for shown, place in ((first, (0.625, 0.375)), (second, (0.125, 0.875))):
        changed = np.abs(shown - plain[0]).sum(-1) > 10
        assert changed.mean() == pytest.approx(1 / 16, rel=0.1)
        for axis in (0, 1):
            assert changed.nonzero()[axis].mean() / shown.shape[axis] == pytest.approx(place[axis], abs=0.02)
    press(page, Keys.ARROW_DOWN)
    assert slice_of(page) == (6, 16)
    np.testing.assert_array_equal(without_attention(page, 0), without_attention(page, 1))
    assert page.find_all("#tabs .share")[1].text.count("%") == 2
    assert "attention A" in hover(page, 0.5, 0.5)
    assert "attention B" in page.text("#readout")
    page.find_all(".compare")[1].click()
    page.settle()
    assert len(page.find_all(".pane")) == 1


def test_items_by_score(show):
    page = show(photograph(items=["low", "high"]))
    page.run("document.querySelectorAll('.item label')[1].click()")

    def order():
        return [text.text for text in page.find_all(".item .text")]

    assert order() == ["low", "high"]  # planted scores fall
    set_field(page, "order", "score")
    assert order() == ["low", "high"]
    explanation = photograph(items=["low", "high"])
    explanation.maps.scores[:] = torch.tensor([0.1, 0.4])
    page = show(explanation)
    assert order() == ["low", "high"]
    set_field(page, "order", "score")
    assert order() == ["high", "low"]


# --- how it looks and who can use it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
def test_nothing_overflows_in_either_scheme(show, size, scheme, tmp_path):
    long_names = study(items=["a finding of " + "many words " * 20, "w" * 120], num_series=9)
    for explanation in (long_names, photograph(name="a" * 150 + ".png")):
        page = show(explanation, width=size[0], height=size[1], scheme=scheme)
        for _ in range(2):
            assert page.run("return document.documentElement.scrollWidth") <= size[0]
            wide = page.run(
                "return [...document.querySelectorAll('main *, header *, footer *')].filter(e => !e.closest('#tabs'))"
                ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
            )
            assert wide == []
            page.find_all(".compare")[1].click()
            page.settle()
        page.run("scrollTo(0, 0)")
        picture = np.asarray(Image.open(page.shoot(tmp_path / "page.png")).convert("L"))
        # The header's ground, and ink on it.
        assert (picture[2, 2] > 200) == (scheme == "light")
        assert np.ptp(picture[4:40].astype(int)) > 150


def test_theme_button(show):
    page = show(photograph(), scheme="dark")

    def is_dark():
        return int(re.findall(r"\d+", page.run("return getComputedStyle(document.body).backgroundColor"))[0]) < 50

    assert is_dark()
    page.find("#theme").click()
    assert not is_dark()
    assert page.text("#theme") == "Theme: light"
    page.find("#theme").click()
    assert is_dark()
    page.find("#theme").click()
    assert page.text("#theme") == "Theme: auto"


def test_every_control_has_a_name_and_shows_its_focus(show):
    page = show(study(affine=AXIAL))
    seen = []
    for _ in range(60):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        element = page.driver.switch_to.active_element
        if element.tag_name == "body":
            break
        name = element.accessible_name
        assert name, element.get_attribute("outerHTML")
        ring = page.run(
            "const box = document.activeElement.closest('.item label') ? document.activeElement.closest('.item')"
            " : document.activeElement; return getComputedStyle(box).outlineStyle"
        )
        assert ring != "none", name
        seen.append(name)
    assert len(seen) >= 15
    # The order of reading: items, series, planes and windows, the image, its slices, then what changes the attention.
    places = [next(k for k, name in enumerate(seen) if part in name) for part in
              ("finding", "SERIES_1", "Axial", "Image:", "Go to peak", "Opacity", "Level")]  # fmt: skip
    assert [places[0], places[1], places[2], places[3], places[5], places[6]] == sorted(places[:4] + places[5:])


def test_prints_the_picture_and_the_items_without_controls(show):
    page = show(study())
    page.emulate(scheme="dark", media="print")
    page.settle()
    hidden = {
        s: page.find(s).is_displayed()
        for s in ("#opacity", "#theme", "#tools", "#slice", ".compare", "#level", "#print")
    }
    assert not any(hidden.values()), hidden
    for selector in (".well canvas", ".item .text", ".item .numbers", "#legend", ".provenance", ".tag"):
        assert page.find(selector).is_displayed(), selector
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = base64.b64decode(page.driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    page.emulate(scheme="light")


def test_texts_are_shown_as_texts(show):
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    page = show(photograph(items=[evil, "plain"], name=f"{evil}.png"))
    assert page.text(".item .text") == evil
    assert page.text("h1") == f"{evil}.png"
    assert page.text(".pane .title") == evil
    assert page.driver.title == f"{evil}.png: where each item looked"
    assert page.find_all("main img") == []


def test_a_page_on_disk_cannot_reach_the_network(chromium, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(photograph(), PROVENANCE), encoding="utf-8")
    chromium.open(path.as_uri())
    with ReportServer("", lambda items: {}) as server:
        refused = chromium.driver.execute_async_script(
            "const done = arguments[1]; fetch(arguments[0]).then(() => done(false), () => done(true))", server.url
        )
        assert refused
    chromium.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert chromium.run("return window.ran") is None
    complaints = " ".join(chromium.complaints())
    assert "connect-src 'none'" in complaints
    assert "script-src 'sha256-" in complaints


# --- texts of one's own -----------------------------------------------------------------------------------------------


@contextmanager
def served(explanation):
    """A server whose model looks at token (1, 1) for every text but one it cannot read."""
    asked = []

    def answer(items):
        asked.append(list(items))
        if "unreadable" in items:
            raise ValueError("this text cannot be read")
        maps = planted_maps((8, 8), [(1, 1)] * len(items))
        return described_items(Explanation(explanation.source, list(items), maps), [text == "long" for text in items])

    page = report_html(explanation, PROVENANCE, ask=ASK_PATH)
    with ReportServer(page, answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.url, asked
        finally:
            server.shutdown()
            thread.join()


def test_a_text_typed_in_is_looked_for(chromium):
    explanation = photograph()
    with served(explanation) as (url, asked):
        chromium.open(url)
        field = chromium.find("#ask-text")
        field.send_keys("a red kite; <b>long</b>;long", Keys.ENTER)
        chromium.wait("document.querySelectorAll('.item').length === 5")
        chromium.settle()
        assert asked == [["a red kite", "<b>long</b>", "long"]]
        assert chromium.text(".pane .title") == "a red kite"
        assert [text.text.split("\n")[0] for text in chromium.find_all(".item .text")[2:]] == asked[0]
        assert "its end was cut off" in chromium.find_all(".item")[4].text
        assert chromium.text("#ask-status") == "Added 3 items."
        assert field.get_attribute("value") == ""
        # Token (1, 1) of 8 × 8 of the view, which begins 10 / 85 into the picture's width.
        shown, plain = pixels(chromium), without_attention(chromium)
        changed = np.abs(shown - plain).sum(-1) > 60
        assert changed.nonzero()[0].mean() / shown.shape[0] == pytest.approx(1.5 / 8, abs=0.03)
        assert changed.nonzero()[1].mean() / shown.shape[1] == pytest.approx((10 + 1.5 * 8) / 85, abs=0.03)
        field.send_keys("unreadable", Keys.ENTER)
        chromium.wait("document.getElementById('ask-status').className === 'wrong'")
        assert chromium.text("#ask-status") == "this text cannot be read"
        assert field.get_attribute("value") == "unreadable"
        assert len(chromium.find_all(".item")) == 5
        own = {message for message in chromium.complaints() if "400 (Bad Request)" not in message}
        assert own == set()
        assert {address.rsplit("/", 1)[0] + "/" for address in chromium.requests()} == {url}
    field.clear()
    field.send_keys("anyone there?", Keys.ENTER)
    chromium.wait("document.getElementById('ask-status').textContent.startsWith('The server does not answer')")
    chromium.complaints()


def test_a_served_page_may_begin_without_items(chromium):
    nothing = Explanation(photograph().source, [], planted_maps((8, 8), ()))
    with served(nothing) as (url, _):
        chromium.open(url)
        assert chromium.text(".pane .title") == "No item yet"
        # Grey, but for the dashes around what the model saw.
        assert (pixels(chromium) == 90).mean() > 0.97
        chromium.find("#ask-text").send_keys("a red kite", Keys.ENTER)
        chromium.wait("document.querySelectorAll('.item').length === 1")
        chromium.settle()
        assert (pixels(chromium) == 90).mean() < 0.95
        assert chromium.complaints() == []


def test_series_of_different_sizes(show):
    """Each series is drawn at its own size and spacing; the place is kept in shares of the body."""
    base = study(num_series=2, spots=((0, 0, 1, 1), (1, 1, 2, 2)))
    first = base.source.views[0]
    other = np.zeros((8, 40, 20), dtype=np.uint8)
    other[6] = 200
    geometry = type(first.geometry).of_input(other.shape).resize((16, 64, 64))
    second = InputView("OTHER", other, "grey", geometry, (6.0, 1.0, 2.0))
    source = ModelInput("mixed", base.source.image, [first, second])
    page = show(Explanation(source, base.items, base.maps))
    assert slice_of(page) == (5, 16)
    page.find_all(".item label")[1].click()
    page.wait("document.querySelector('#tab-1').getAttribute('aria-selected') === 'true'")
    page.settle()
    assert slice_of(page) == (7, 8)
    press(page, "o")
    shown = pixels(page)
    assert shown.min() > 190
    assert shown.shape[0] == pytest.approx(shown.shape[1], abs=2)
