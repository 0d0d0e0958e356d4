// SPDX-License-Identifier: Apache-2.0

package results

import (
	"hash/fnv"
	"math"
	"math/rand/v2"
	"slices"

	"golang.org/x/perf/benchmath"
	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"
)

const (
	confidence = 0.95
	resamples  = 2000 // of every bootstrap
	alpha      = 0.05 // of every test
)

// summary is a median with its interval.
type summary struct {
	median   float64
	low, top float64 // the 95 % interval; the range where there are too few values for one
	n        int
}

// summarize returns the median of values and its interval by order statistics, both from
// benchmath. The interval of fewer than six values does not exist: their range stands for it.
func summarize(values []float64) summary {
	if len(values) == 0 {
		return summary{median: math.NaN(), low: math.NaN(), top: math.NaN()}
	}
	s := benchmath.AssumeNothing.Summary(sample(values), confidence)
	out := summary{median: s.Center, low: s.Lo, top: s.Hi, n: len(values)}
	if math.IsInf(out.low, 0) || math.IsInf(out.top, 0) {
		out.low, out.top = slices.Min(values), slices.Max(values)
	}
	return out
}

func sample(values []float64) *benchmath.Sample {
	// NewSample sorts in place.
	return benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds)
}

// median returns NaN for no values.
func median(values []float64) float64 {
	return summarize(values).median
}

// aaNoise is what an A/A pair says about noise. The zero value is that of a pair without data; nothing is claimed with it.
type aaNoise struct {
	known bool
	// floor is the 95th percentile of |difference| over the rounds, in the metric's unit.
	floor float64
	// relative bounds the difference of two medians at one rung, over √(a² + b²). Noise grows
	// with the cost: what is a difference at 16 µs is none at 160 µs.
	relative float64
	// effects are the rungs' median differences without their mean, standardised.
	effects []float64
}

// noiseOf reads the noise from the differences of an A/A pair.
func noiseOf(rungs []rung) aaNoise {
	n := aaNoise{known: len(rungs) > 0, floor: math.NaN(), relative: math.NaN()}
	if !n.known {
		return n
	}
	var absolute, relative, medians, weights []float64
	var squares float64
	for _, r := range rungs {
		for _, v := range r.values {
			absolute, relative = append(absolute, math.Abs(v)), append(relative, math.Abs(v)/r.scale)
		}
		m := median(r.values)
		squares += m * m / (r.scale * r.scale)
		medians, weights = append(medians, m), append(weights, 1/(r.scale*r.scale))
	}
	slices.Sort(absolute)
	slices.Sort(relative)
	n.floor = quantile(confidence, absolute)
	// All rounds of a rung share its effect, so six rungs of ten rounds are nearer to six values than to sixty, and
	// their 95th percentile is too small to hold for the next rung. Student's t with a degree of freedom for each rung is not.
	k := float64(len(rungs))
	t := distuv.StudentsT{Sigma: 1, Nu: k}.Quantile(1 - alpha/2)
	n.relative = max(quantile(confidence, relative), t*math.Sqrt(squares/k))
	if len(rungs) > 1 {
		mean := stat.Mean(medians, weights)
		for i, r := range rungs {
			n.effects = append(n.effects, (medians[i]-mean)/r.scale)
		}
	}
	return n
}

// differs claims that a and b are different: Mann–Whitney says p < 0.05, and their medians are further apart than the noise explains.
// Nothing is claimed where the noise is not known.
func differs(a, b []float64, noise aaNoise) bool {
	if len(a) == 0 || len(b) == 0 || !noise.known {
		return false
	}
	x, y := median(a), median(b)
	if d := math.Abs(x - y); d <= noise.floor || d <= noise.relative*math.Hypot(x, y) {
		return false
	}
	return benchmath.AssumeNothing.Compare(sample(a), sample(b)).P < alpha
}

// quantile returns the p-quantile of sorted values by linear interpolation.
func quantile(p float64, sorted []float64) float64 {
	return stat.Quantile(p, stat.LinInterp, sorted, nil)
}

// source returns a random source that depends on the run's seed and the
// name of what is computed, not on the order in which things are computed.
func source(seed int64, name ...string) *rand.Rand {
	h := fnv.New64a()
	for _, s := range name {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	return rand.New(rand.NewPCG(uint64(seed), h.Sum64()))
}

// resampledMedian returns the median of a resample, with replacement, of sorted values.
// counts is scratch space of the same length.
func resampledMedian(rng *rand.Rand, sorted []float64, counts []int) float64 {
	n := len(sorted)
	clear(counts)
	for i := 0; i < n; i += 2 {
		// Two draws from one word; the bias of n in 2³² is nothing beside the noise.
		u := rng.Uint64()
		counts[(u>>32)*uint64(n)>>32]++
		if i+1 < n {
			counts[(u&math.MaxUint32)*uint64(n)>>32]++
		}
	}
	// The order statistics (n-1)/2 and n/2, which are one for odd n.
	at := func(k int) float64 {
		seen := 0
		for i, c := range counts {
			if seen += c; seen > k {
				return sorted[i]
			}
		}
		return sorted[n-1]
	}
	if n%2 == 1 {
		return at(n / 2)
	}
	return (at(n/2-1) + at(n/2)) / 2
}
