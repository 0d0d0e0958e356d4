// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"math/rand/v2"
	"slices"
)

// perPosition is how many Services stand for one place in a chain: enough that no single one's luck counts, few enough that
// the place is one place.
const perPosition = 8

// connect opens connections through Services at the head, in the middle and at the tail of the chain, and at random.
type connect struct{}

var _ connecting = connect{}

func (connect) Name() string { return "connect" }
func (connect) Doc() string {
	return "connect(2) through Services at the head, in the middle, at the tail of the chain, and at random"
}
func (connect) Targets() []string    { return []string{"head", "middle", "tail", "random"} }
func (connect) ThroughService() bool { return true }

// Spread is 4 for random. In a chain of N rules of equal cost the median of n random places has a standard error of 1/√n of
// itself: 4.5 % for 500.
func (connect) Spread(target string) int {
	if target == "random" {
		return 4
	}
	return 1
}

// Services picks a place by the chain as the kernel holds it. Modes without a chain get the union of what the modes with one
// visit, so that all walk the same Services.
func (connect) Services(r *rung, site *site, target string, rng *rand.Rand, count int) []int {
	if target == "random" {
		picked := make([]int, count)
		for i := range picked {
			picked[i] = rng.IntN(r.services)
		}
		return picked
	}
	if len(site.chain) > 0 {
		return atPlace(site.chain, target)
	}
	var union []int
	for _, s := range r.sites {
		if len(s.chain) > 0 {
			union = append(union, atPlace(s.chain, target)...)
		}
	}
	if len(union) == 0 {
		// No mode of this run has a chain: any Services will do, the same for each target and site.
		for i := range min(perPosition, r.services) {
			union = append(union, i*r.services/min(perPosition, r.services))
		}
	}
	slices.Sort(union)
	return slices.Compact(union)
}

// atPlace is perPosition neighbours at the head, middle or tail of a chain.
func atPlace(chain []int, target string) []int {
	n := min(perPosition, len(chain))
	switch target {
	case "head":
		return chain[:n]
	case "middle":
		return chain[(len(chain)-n)/2:][:n]
	default:
		return chain[len(chain)-n:]
	}
}
