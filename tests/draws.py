"""How often the examples of a property are drawn."""

from hypothesis import settings

USUAL = settings.get_profile("patient").max_examples
FEWEST = 5


def draws(count, **more):
    """Return settings for ``count`` examples, and for as many fewer as the profile has fewer than usual."""
    share = settings.default.max_examples / USUAL
    return settings(max_examples=max(min(count, FEWEST), round(count * share)), **more)
