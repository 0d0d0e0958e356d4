// SPDX-License-Identifier: Apache-2.0

package results

import (
	"testing"
)

func TestLook(t *testing.T) {
	run := synthetic{seed: 1, ladder: []int{100, 1000, 2000, 5000, 10000, 20000}, rounds: 10, rho: .003, sigma: .007}.run()
	if err := run.Render("/tmp/look"); err != nil {
		t.Fatal(err)
	}
}
