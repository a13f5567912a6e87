"""The program `tropd`: prompts -> rollout -> teacher scores -> credit -> loss -> optimizer."""

__version__ = "0.1.0"
