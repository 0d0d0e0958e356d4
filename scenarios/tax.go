// SPDX-License-Identifier: Apache-2.0

package scenarios

import "math/rand/v2"

// tax connects to a pod's own address on a node that carries N Services: what every new connection pays, Service or not.
type tax struct{}

var _ connecting = tax{}

func (tax) Name() string { return "tax" }
func (tax) Doc() string {
	return "connect(2) to a pod's own address on a node that carries N Services: what connections pay that use none"
}
func (tax) Targets() []string    { return []string{"pod"} }
func (tax) Spread(string) int    { return 1 }
func (tax) ThroughService() bool { return false }

// Services picks one: its endpoints stand for any pod.
func (tax) Services(*rung, *site, string, *rand.Rand, int) []int { return []int{0} }
