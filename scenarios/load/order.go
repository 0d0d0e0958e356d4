// SPDX-License-Identifier: Apache-2.0

package load

import "math/rand/v2"

// order returns the indices of addresses for count operations over n addresses: one random permutation after the other,
// cut off at count. Each address is used equally often, give or take one, and with count < n it is a sample without
// replacement. The stream keeps the warm-up's order apart from the recorded one.
func order(seed, stream uint64, n, count int) []uint32 {
	r := rand.New(rand.NewPCG(seed, stream))
	indices := make([]uint32, 0, count)
	permutation := make([]uint32, n)
	for i := range permutation {
		permutation[i] = uint32(i)
	}
	for len(indices) < count {
		r.Shuffle(n, func(i, j int) { permutation[i], permutation[j] = permutation[j], permutation[i] })
		indices = append(indices, permutation[:min(n, count-len(indices))]...)
	}
	return indices
}
