// Coefficients of the two polynomial forms of GELU, x Phi(x), shared by host and device code. Both approximate the
// exact (erf) GELU.
#pragma once

namespace riformer {

// Phi(-t sqrt(2)) = erfc(t) / 2 with erfc(t) = u (p0 + u (p1 + ...)) exp(-t^2), u = 1 / (1 + kErfcScale t), t >= 0:
// the form of Abramowitz and Stegun 7.1.26, refitted with six terms and the error weighted by t, since GELU multiplies
// it by x. Largest absolute error of x * Phi(x) over [-9, 9] in exact arithmetic: 1.1e-8, a fifth of a float32 ulp
// at 1.
constexpr float kErfcScale = 0.4f;
constexpr int kErfcTerms = 6;
constexpr float kErfc[kErfcTerms] = {0.23334238646711702f,  0.15291425735660336f, 0.49046121805498555f,
                                     -0.39833420480013804f, 0.725980264899525f,   -0.20436398639774003f};

// Phi(x) = 1/2 + v P(v^2), v = clamp(x, -kPhiClamp, kPhiClamp), constrained to reach 1/2 +- 1/2 at the clamp. Largest
// absolute error of x * Phi(x): 2.5e-5 inside the clamp, for results that are rounded to bfloat16 (half an ulp at
// 0.01 is 3e-5, at 1 it is 2e-3).
constexpr float kPhiClamp = 4.4f;
constexpr int kPhiTerms = 9;
constexpr float kPhi[kPhiTerms] = {0.39876160147160244f,    -0.06607642473899802f,  0.009643025689081848f,
                                   -0.0010549918775998287f, 8.429291885769224e-05f, -4.724859371783133e-06f,
                                   1.7408427003910305e-07f, -3.75403611738265e-09f, 3.569414252016512e-11f};

}  // namespace riformer
