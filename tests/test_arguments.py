"""A call's other arguments: global ones, one value per sample, flags; in any order, at the first or a later call."""

from __future__ import annotations

import pytest
import torch

import networks
import oracle
from cropvote import hflip, inject_crop_vote
from cropvote.errors import PlainModelError, SiteError
from networks import IMAGES

AROUND = "CV101"


class Heated(networks.Net):
    """Takes a second argument: a temperature for all samples, or one per sample."""

    def forward(self, x, temperature):
        return super().forward(x) / temperature


@pytest.mark.parametrize("count", [1, 3])
def test_a_global_argument_may_bypass_the_site(count):
    model = Heated().eval()
    images, temperature = IMAGES[:count], torch.tensor([2.0])
    expected = model(images.flip(3), temperature) / 2 + model(images, temperature) / 2
    inject_crop_vote(model, after="input", views=hflip())
    assert torch.allclose(model(images, temperature), expected, atol=1e-6)


def test_an_argument_that_the_input_size_cannot_provide():
    with pytest.raises(PlainModelError, match="CV414"):
        inject_crop_vote(Heated().eval(), after="site", input_size=48)


def test_a_per_sample_argument_may_not_bypass_the_site():
    for args, kwargs in (((IMAGES, torch.ones(3, 1)), {}), ((IMAGES,), {"temperature": torch.ones(3, 1)})):
        model = inject_crop_vote(Heated().eval(), after="site")
        with pytest.raises(SiteError, match="CV102"):
            model(*args, **kwargs)


class Reversed(networks.Net):
    """Its first tensor is not an image, and joins after the site."""

    def forward(self, numbers, x):
        return super().forward(x) * numbers


def test_a_first_tensor_that_is_not_an_image_is_named():
    model = inject_crop_vote(Reversed().eval(), after="site")
    with pytest.raises(SiteError, match="CV102"):
        model(torch.ones(3, 1), IMAGES)


class Clip(networks.Net):
    """Its only tensor has five axes, and there is a path around the site."""

    def forward(self, x):
        x = self.front(x.mean(1))
        return self.head(self.site(x) + x)


def test_a_bypass_in_a_model_with_one_argument_names_no_argument():
    model = inject_crop_vote(Clip().eval(), after="site")
    with pytest.raises(SiteError, match=AROUND):
        model(IMAGES[:, None])


class Met(networks.Net):
    """Takes more arguments per sample: some used before the site, some after it."""

    def forward(self, x, before, *behind, scale):
        x = super().forward(x + before[:, :, None, None])
        return x * scale + sum(behind)


@pytest.mark.parametrize(
    ("behind", "scale", "named"),
    [((), 2.0, None), ((), torch.ones(3, 1), "scale"), ((torch.ones(7), torch.ones(3, 1)), 2.0, "behind")],
)
def test_only_the_argument_that_bypasses_the_site_is_named(behind, scale, named):
    model, before, plain = Met().eval(), torch.randn(3, 3), networks.Net().eval()
    plain.load_state_dict(model.state_dict())
    inject_crop_vote(model, after="site")
    if named:
        with pytest.raises(SiteError, match=f"CV102.*'{named}'"):
            model(IMAGES, before, *behind, scale=scale)
        if not behind:
            with pytest.raises(SiteError, match="CV102"):
                model(scale=scale, before=before, x=IMAGES)
    else:
        rows = oracle.tail_rows(plain, "site", IMAGES + before[:, :, None, None], oracle.ten_views)
        found = model(IMAGES, before, *behind, scale=scale)
        assert torch.allclose(found.double(), oracle.vote(rows, "soft") * scale, atol=1e-6)


class Optional(networks.Net):
    """A second argument opens a path around the site."""

    def forward(self, x, condition=None):
        x = self.front(x)
        return self.head(self.site(x) + (0 if condition is None else condition))


def test_an_argument_given_later_is_checked_then():
    model = inject_crop_vote(Optional().eval(), after="site", input_size=48)
    assert model(IMAGES).shape == model(x=IMAGES).shape == (3, 7)
    with pytest.raises(SiteError, match="CV102"):
        model(IMAGES[:1], torch.ones(1, 8, 1, 1))
    assert model(IMAGES).shape == (3, 7)


class Masked(networks.Net):
    def forward(self, x, mask):
        return super().forward(x * mask)


def test_the_order_of_keywords_does_not_matter():
    model = inject_crop_vote(Masked().eval(), after="input", views=hflip())
    mask = torch.rand(48, 48)
    assert torch.equal(model(x=IMAGES, mask=mask), model(mask=mask, x=IMAGES))
