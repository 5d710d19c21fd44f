"""Preference losses, a file each: per-example denoising errors in, per-example loss out.

An error is the squared error of a prediction, as the mean over a latent's elements. Every file says
of itself all of these:

    uses_reference  the loss needs the errors of the reference; else they may be None
    same_noise      chosen and rejected get the same noise (they share the timestep in any case)
    uses_products   the loss also takes `chosen_product` and `rejected_product` [b]: the mean over
                    elements of policy residual times reference residual (prediction - target)
    is_listwise     loss(policy, reference, scores, mask, *, beta): lists of candidates, not pairs
    is_batchwise    a row's loss depends on other rows, too

Pairs: loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta, ...). A
loss that declares the keyword `num_elements` is given the number of a latent's elements. All return
(loss [b], metrics), each metric [b] or a scalar.
"""
