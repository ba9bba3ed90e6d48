"""From checkpoints to models and back."""

from jaxquant.convert.export import export_pretrained as export_pretrained
from jaxquant.convert.load import from_pretrained as from_pretrained
from jaxquant.convert.read import read_quantized as read_quantized
from jaxquant.convert.save import save_pretrained as save_pretrained
