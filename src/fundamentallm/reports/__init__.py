"""What runs did, as a page and as a table; reading the files is kept from drawing them."""
