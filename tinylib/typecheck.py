"""The run-time check of signatures that tests switch on; an int will do where a float is wanted, as in PEP 484."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
