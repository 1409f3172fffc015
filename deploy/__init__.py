"""What it takes to deploy pdserve: the image, the chart, and what is generated for them."""
