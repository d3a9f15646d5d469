"""What a person types after an installation: ``partialfc COMMAND``; each module here is one."""
