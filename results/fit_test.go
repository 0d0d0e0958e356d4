// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
)

var (
	fiveRungs = []int{100, 1000, 2000, 5000, 10000}
	sixRungs  = []int{100, 1000, 2000, 5000, 10000, 20000}
)

// simulations returns how many synthetic runs to make, and by how much a share may miss its limit when they are few.
func simulations(n int) (runs int, slack float64) {
	if testing.Short() || raceEnabled {
		return n / 20, 0.08
	}
	return n, 0
}

// judge makes synthetic runs and counts their verdicts. covered counts the intervals that hold slope.
func judge(runs int, ladder []int, rounds int, rho, sigma, slope float64, truth func(n float64) float64) (verdicts map[Model]int, covered int) {
	rng := rand.New(rand.NewPCG(uint64(rounds), uint64(len(ladder))))
	verdicts = map[Model]int{}
	for range runs {
		d, aa := noisyRungs(rng, ladder, rounds, rho, sigma, truth)
		f := fit(d, noiseOf(aa), rng)
		verdicts[f.model]++
		if f.low <= slope && slope <= f.high {
			covered++
		}
	}
	return verdicts, covered
}

// Every node, the twin included, has rung effects of its own; the truth is flat.
func TestFlatIsNotCalledGrowing(t *testing.T) {
	runs, slack := simulations(1000)
	for _, ladder := range [][]int{fiveRungs, sixRungs} {
		for _, rounds := range []int{6, 10} {
			for _, rho := range []float64{0, 0.003, 0.01} {
				for _, sigma := range []float64{0.003, 0.02} {
					t.Run(settingName(len(ladder), rounds, rho, sigma), func(t *testing.T) {
						t.Parallel()
						verdicts, covered := judge(runs, ladder, rounds, rho, sigma, 0, func(float64) float64 { return 16500 })
						share := func(n int) float64 { return float64(n) / float64(runs) }
						t.Logf("%v, interval holds the truth in %.1f %%", verdicts, 100*share(covered))
						if wrong := share(runs - verdicts[Constant]); wrong > 0.05+slack {
							t.Errorf("%.1f %% are not called O(1): %v", 100*wrong, verdicts)
						}
						if share(covered) < 0.93-slack {
							t.Errorf("the interval holds the truth in %.1f %%, want 95 %%", 100*share(covered))
						}
					})
				}
			}
		}
	}
}

func TestGrowthIsFound(t *testing.T) {
	runs, slack := simulations(200)
	for _, truth := range []struct {
		name  string
		model Model
		slope float64 // of O(n)
		f     func(n float64) float64
	}{
		{"15 ns per Service", Linear, 15, func(n float64) float64 { return 22000 + 15*n }},
		{"2.7 ns per Service", Linear, 2.7, func(n float64) float64 { return 20500 + 2.7*n }},
		{"1 µs per doubling", Logarithmic, math.NaN(), func(n float64) float64 { return 17000 + 1000*math.Log2(n) }},
	} {
		for _, ladder := range [][]int{fiveRungs, sixRungs} {
			for _, rho := range []float64{0, 0.003, 0.01} {
				t.Run(truth.name+"/"+settingName(len(ladder), 10, rho, 0.01), func(t *testing.T) {
					t.Parallel()
					verdicts, covered := judge(runs, ladder, 10, rho, 0.01, truth.slope, truth.f)
					if float64(verdicts[truth.model]) < (0.95-slack)*float64(runs) {
						t.Errorf("%s found in %v of %d", truth.model, verdicts, runs)
					}
					if truth.model == Linear && float64(covered) < (0.90-slack)*float64(runs) {
						t.Errorf("the interval holds the slope in %d of %d", covered, runs)
					}
				})
			}
		}
	}
}

func TestFewRungs(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for rungs, ladder := range map[int][]int{1: {100}, 2: {100, 1000}, 3: {100, 1000, 5000}, 4: {100, 1000, 2000, 5000}} {
		d, aa := noisyRungs(rng, ladder, 10, 0.003, 0.007, func(n float64) float64 { return 22000 + 15*n })
		f := fit(d, noiseOf(aa), rng)
		if f.model != Undecided || f.note == "" {
			t.Errorf("%d rungs of growing cost: %s, %q; want undecided and why", rungs, f.model, f.note)
		}
		if rungs >= 3 && !(f.low > 10 && f.high < 20) {
			t.Errorf("%d rungs: slope %.1f in (%.1f, %.1f), want about 15 and a useful interval", rungs, f.slope, f.low, f.high)
		}
	}
}

// What grows for certain, but by less than the noise floor, is O(1), and the note says so.
func TestGrowthBelowTheFloorIsNamed(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	named := 0
	for range 50 {
		d, _ := noisyRungs(rng, sixRungs, 10, 0.003, 0.003, func(n float64) float64 { return 16500 + 0.04*n })
		f := fit(d, aaNoise{known: true, floor: 850}, rng)
		if f.model == Constant && f.bound >= 850 && f.low > 0 {
			if !strings.Contains(f.note, "less than the noise floor") {
				t.Errorf("a slope of %.3f to %.3f ns is noted as %q", f.low, f.high, f.note)
			}
			named++
		}
	}
	if named < 10 {
		t.Errorf("%d of 50 runs show growth below the floor", named)
	}
}

// With three and four rungs no law is named, but growth is: seldom where there is none, and always where iptables pays.
func TestGrowthOfFewRungs(t *testing.T) {
	for _, ladder := range [][]int{{100, 1000, 5000}, {100, 1000, 5000, 10000}} {
		for _, rho := range []float64{0.003, 0.01} {
			for slope, limits := range map[float64][2]float64{0: {0, 0.05}, 2.7: {0.95, 1}, 15: {0.95, 1}} {
				t.Run(fmt.Sprintf("%s/slope=%g", settingName(len(ladder), 6, rho, 0.007), slope), func(t *testing.T) {
					runs, slack := simulations(300)
					rng := rand.New(rand.NewPCG(uint64(len(ladder)), 6))
					grow := 0
					for range runs {
						d, aa := noisyRungs(rng, ladder, 6, rho, 0.007, func(n float64) float64 { return 20500 + slope*n })
						noise := noiseOf(aa)
						if fit(d, noise, rng).grows(noise.floor) {
							grow++
						}
					}
					if share := float64(grow) / float64(runs); share < limits[0]-slack || share > limits[1]+slack {
						t.Errorf("%.1f %% are said to grow, want %g to %g", 100*share, limits[0], limits[1])
					}
				})
			}
		}
	}
}

func TestOneRoundHasNoInterval(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	d, aa := noisyRungs(rng, sixRungs, 1, 0.003, 0.007, func(n float64) float64 { return 22000 + 15*n })
	f := fit(d, noiseOf(aa), rng)
	if f.model != Undecided || !math.IsNaN(f.low) || !math.IsNaN(f.high) || !(f.slope > 10 && f.slope < 20) || !strings.Contains(f.note, "one measurement") {
		t.Errorf("one round: %+v", f)
	}
}

func TestCoverageWithFewRungs(t *testing.T) {
	for _, ladder := range [][]int{{100, 1000, 5000}, {100, 1000, 5000, 10000}} {
		t.Run(fmt.Sprint(len(ladder)), func(t *testing.T) {
			runs, slack := simulations(300)
			_, covered := judge(runs, ladder, 6, 0.01, 0.003, 15, func(n float64) float64 { return 22000 + 15*n })
			if float64(covered) < (0.90-slack)*float64(runs) {
				t.Errorf("the interval holds the slope in %d of %d", covered, runs)
			}
		})
	}
}

// A step is no growth law: neither O(log n) nor O(n) may be claimed, and the word O(1) only with the bound that the data leave.
func TestNeitherLawFits(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	zigzag := map[float64]float64{100: 16000, 1000: 24000, 2000: 15000, 5000: 26000, 10000: 16000, 20000: 25000}
	d, aa := noisyRungs(rng, sixRungs, 10, 0.001, 0.003, func(n float64) float64 { return zigzag[n] })
	f := fit(d, noiseOf(aa), rng)
	if f.model == Linear || f.model == Logarithmic {
		t.Errorf("zigzag is called %s", f.model)
	}
	if f.bound < 5000 {
		t.Errorf("a rise of more than %.0f ns is said to be excluded by data that jump by 10000", f.bound)
	}
}

func TestNoTwinNoVerdict(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	d, _ := noisyRungs(rng, sixRungs, 10, 0, 0.003, func(float64) float64 { return 16500 })
	if f := fit(d, aaNoise{}, rng); f.model != Undecided || f.note == "" || math.IsNaN(f.low) {
		t.Errorf("without an A/A pair: %+v; want undecided, why, and an interval", f)
	}
}

// A run of three nodes of one mode: two give the floor, and the third, which differs from the first in nothing, is held against it.
func TestAAPairsClaimNoDifference(t *testing.T) {
	flat := func(float64) float64 { return 16000 }
	for _, rho := range []float64{0, 0.003, 0.01} {
		for _, sigma := range []float64{0.003, 0.02} {
			for _, rounds := range []int{6, 10} {
				rng := rand.New(rand.NewPCG(7, uint64(rounds)))
				runs, slack := simulations(300)
				claimed := 0
				for range runs {
					d, aa := noisyRungs(rng, sixRungs, rounds, rho, sigma, flat)
					noise := noiseOf(aa)
					for _, r := range d {
						a, b := make([]float64, rounds), make([]float64, rounds)
						for i, v := range r.values {
							base := 16000 * (1 + sigma*rng.NormFloat64())
							a[i], b[i] = base+v/2, base-v/2
						}
						if differs(a, b, noise) {
							claimed++
						}
					}
				}
				if pairs := runs * len(sixRungs); float64(claimed) > (0.05+slack)*float64(pairs) {
					t.Errorf("%s: %d of %d A/A pairs are called different", settingName(6, rounds, rho, sigma), claimed, pairs)
				}
			}
		}
	}
}

func TestDiffers(t *testing.T) {
	a := []float64{100, 101, 102, 103, 104, 105}
	b := []float64{110, 111, 112, 113, 114, 115}
	for _, test := range []struct {
		name  string
		a, b  []float64
		noise aaNoise
		want  bool
	}{
		{"apart", a, b, aaNoise{known: true, floor: 5}, true},
		{"within the floor", a, b, aaNoise{known: true, floor: 11}, false},
		{"within the relative noise", a, b, aaNoise{known: true, floor: 5, relative: 0.1}, false},
		{"noise not known", a, b, aaNoise{}, false},
		{"too few to tell", a[:2], b[:2], aaNoise{known: true, floor: 5}, false},
		{"nothing", nil, b, aaNoise{known: true, floor: 5}, false},
	} {
		if got := differs(test.a, test.b, test.noise); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

func TestResampledMedianKeepsTheMedian(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, values := range [][]float64{{7}, {1, 2}, {1, 2, 3, 4, 100}, {1, 2, 3, 4, 5, 600}} {
		var sum float64
		for range 2000 {
			m := resampledMedian(rng, values, make([]int, len(values)))
			if m < values[0] || m > values[len(values)-1] {
				t.Fatalf("median %v of a resample of %v", m, values)
			}
			if m <= median(values) {
				sum++
			}
		}
		if share := sum / 2000; len(values) > 1 && (share < 0.4 || share > 0.85) {
			t.Errorf("%v: %.2f of the medians are at or below that of the sample", values, share)
		}
	}
}

// The exported slope is that of costs that were made with it, and knows how far it may be off.
func TestSlopeOfStraightLines(t *testing.T) {
	services := []int{100, 1_000, 10_000, 20_000, 50_000}
	for _, want := range []float64{0, 0.01, 2} {
		rng := rand.New(rand.NewPCG(7, 7))
		mode, floor := make([][]float64, len(services)), make([][]float64, len(services))
		for i, n := range services {
			for range 40 {
				drift := 100 * rng.NormFloat64() // both of a pair have it
				floor[i] = append(floor[i], 500+drift)
				mode[i] = append(mode[i], 700+drift+want*float64(n)+20*rng.NormFloat64())
			}
		}
		slope, low, high := Slope(services, mode, floor, 1)
		if low > want || high < want || high-low > 0.01 {
			t.Errorf("of costs that rise by %v a Service the slope is %v, from %v to %v", want, slope, low, high)
		}
		again, alow, ahigh := Slope(services, mode, floor, 1)
		if again != slope || alow != low || ahigh != high {
			t.Errorf("one seed gives the slope %v, from %v to %v, and then %v, from %v to %v", slope, low, high, again, alow, ahigh)
		}
	}
}
