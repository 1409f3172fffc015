"""Property tests have no deadline per example: a busy machine is no defect of what is tested."""

from hypothesis import settings

settings.register_profile("pdserve", deadline=None)
settings.load_profile("pdserve")
