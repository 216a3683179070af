"""A page in a headless browser: what its scripts say, and what they complain about."""

import asyncio
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def in_browser(page, *expressions, dark=False, width=1440):
    """Values of JavaScript expressions in a page, one after the other, and the page's errors.

    ("key", NAME) in place of an expression presses a key.
    """
    return asyncio.run(_in_browser(page, expressions, dark, width))


_NAMELESS = """[...document.querySelectorAll("button, input, select, [role=img], section")].filter((part) => !(
  part.getAttribute("aria-label") || part.textContent.trim() && part.tagName === "BUTTON" || part.labels?.length ||
  document.getElementById(part.getAttribute("aria-labelledby"))?.textContent.trim())).map((part) => part.outerHTML)"""
LOOKS = [(1440, False), (390, True)]  # a wide screen by day, a phone by night


def assert_every_figure_is_drawn(page, *, width, dark, title=None):
    """In the page's look, with data, without an error, and nothing wider than the screen. Returns how many there are."""
    figures = "[...document.querySelectorAll('.js-plotly-plot')]"
    values, errors = in_browser(
        page,
        f"{figures}.length",
        f"{figures}.filter((figure) => !figure.querySelector('.trace, .heatmaplayer image, .hm')).map((f) => f.id)",
        "document.querySelectorAll('[id^=figure-], .cell, #words-figure').length",
        "document.title",
        "getComputedStyle(document.body).backgroundColor",
        f"{figures}.map((figure) => figure.layout.template.layout.paper_bgcolor)",
        "document.documentElement.scrollWidth <= window.innerWidth",
        _NAMELESS,
        dark=dark,
        width=width,
    )
    n, empty, places, shown, background, papers, fits, nameless = values
    assert errors == []
    assert n == places > 0
    assert empty == []
    assert title is None or shown == title
    assert background == ("rgb(22, 22, 22)" if dark else "rgb(255, 255, 255)")
    assert set(papers) == {"#161616" if dark else "#FFFFFF"}
    assert fits
    assert nameless == []
    return n


async def _in_browser(page, expressions, dark, width):
    from choreographer import Browser

    async with Browser(CHROMIUM, headless=True, enable_sandbox=False) as browser:
        tab = await browser.create_tab("about:blank")

        async def send(command, **params):
            answer = await tab.send_command(command, params or None)
            assert "error" not in answer, answer
            return answer["result"]

        await send("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await send("Emulation.setEmulatedMedia", features=[scheme])
        catch = "window.pageErrors = []; addEventListener('error', (event) => pageErrors.push(event.message));"
        catch += "console.error = (...words) => pageErrors.push(words.join(' '));"
        await send("Page.enable")
        await send("Page.addScriptToEvaluateOnNewDocument", source=catch)
        await send("Page.navigate", url=page.as_uri())

        async def value(expression):
            options = {"returnByValue": True, "awaitPromise": True}
            found = await send("Runtime.evaluate", expression=expression, **options)
            assert "exceptionDetails" not in found, found["exceptionDetails"]
            return found["result"].get("value")

        for _ in range(300):
            if await value("document.readyState === 'complete' && location.href !== 'about:blank'"):
                break
            await asyncio.sleep(0.1)
        await value("new Promise((done) => setTimeout(done, 500))")  # plotly draws

        async def done(expression):
            if isinstance(expression, str):
                return await value(expression)
            key = expression[1]
            code = {"Home": 36, "ArrowRight": 39}[key]
            for kind in ("keyDown", "keyUp"):
                await send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
            return None

        values = [await done(expression) for expression in expressions]
        return values, await value("pageErrors")
