from tests import flags

flags.read_what_is_asked()
