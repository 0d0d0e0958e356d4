// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// speed is a state of a CPU: how often it is in it, the reference in it with its scatter, and the time of a connect.
type speed struct {
	share              float64
	reference, scatter float64
	connect            float64
}

// readings are n slices on a CPU with these speeds; a connect scatters by 1.5 %.
func readings(n int, speeds []speed) []reading {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	seen := make([]reading, n)
	for i := range seen {
		draw, s := rng.Float64(), speeds[0]
		for _, s = range speeds {
			if draw -= s.share; draw < 0 {
				break
			}
		}
		seen[i] = reading{
			reference: time.Duration(s.reference + s.scatter*rng.Float64()),
			connect:   time.Duration(s.connect * (1 + 0.015*rng.NormFloat64())),
		}
	}
	return seen
}

func TestQuietLimitIsWhereConnectsBecomeSlow(t *testing.T) {
	for _, test := range []struct {
		name      string
		speeds    []speed
		low, high time.Duration
	}{
		{"one speed", []speed{{1, 5500, 150, 17000}}, 5600, 5650},
		{"a neighbour in the core", []speed{{0.5, 5500, 150, 17000}, {0.1, 6000, 500, 19500}, {0.4, 7000, 500, 24500}}, 5600, 5750},
		{"a neighbour in the core most of the time", []speed{{0.1, 5500, 150, 17000}, {0.9, 7000, 500, 22000}}, 5600, 5750},
		{"a reference that scatters more than connects do", []speed{{0.3, 3500, 100, 12000}, {0.68, 3650, 350, 12200}, {0.02, 4400, 200, 14000}}, 3950, 4100},
	} {
		got, err := quietLimit(readings(8000, test.speeds))
		if err != nil || got < test.low || got > test.high {
			t.Errorf("%s: connects count up to %s (%v), want %s to %s", test.name, got, err, test.low, test.high)
		}
	}
	if got, err := quietLimit(readings(leastSlices-1, []speed{{1, 5500, 150, 17000}})); err == nil || !strings.Contains(err.Error(), "are needed") {
		t.Errorf("too few slices give %s and the error %v", got, err)
	}
}
