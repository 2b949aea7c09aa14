"""Secure aggregation: sites add numbers up so that the server learns their sum and nothing else of them.

The protocol is that of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
on the sparse graph of Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (SecAgg+):

1. each site makes two X25519 keys for the round and sends the public ones;
2. each site shares its mask key and a seed among its neighbors (Shamir 1979), encrypted for each of them;
3. each site sends its numbers, in a ring of 2^64, plus a mask from its seed, plus or minus a mask for each near
   neighbor that took part in step 2; the latter cancel in the sum;
4. the server names who sent step 3; neighbors hand over their shares of the seed of those who did, and of the mask key
   of those who did not, never both of one site; the server subtracts what does not cancel.

`ring` has the numbers, `graph` who is whose neighbor, `shamir` the shares, `masks` keys and masks, `site` what a site
does, `server` what the server does with what came, and
`gaussian` noise for privacy. Nothing here sends a message.
"""
