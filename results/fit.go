// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"
)

// Model names how a cost grows with the number of Services.
type Model string

// The models of a verdict.
const (
	Constant    Model = "O(1)"
	Logarithmic Model = "O(log n)"
	Linear      Model = "O(n)"
	Undecided   Model = "undecided"
)

const (
	minRungs = 5 // below, AICc with its two or three parameters has nothing to say
	// aiccMargin is how much better one growth law must fit than the other before it is named:
	// below 2 both are about as likely (Burnham and Anderson, Model Selection, 2002, 2.6).
	aiccMargin = 2
)

// rung is what is known of one mode at one rung.
type rung struct {
	services float64
	values   []float64 // one a round: the cost above the floor, in the metric's unit
	// scale is what noise is proportional to: √(mode² + floor mode²) of the raw
	// medians. Noise grows with the cost, so the rungs do not weigh the same.
	scale float64
}

// fitResult is what the rungs of one mode and metric say.
type fitResult struct {
	model Model
	// slope per Service of the straight line, whatever the model, and its interval.
	slope, low, high float64
	// rise is the growth over the whole ladder as the better of the two growth laws has it.
	rise float64
	// bound is the largest |rise| over the ladder that the intervals of both growth laws do not exclude.
	bound float64
	note  string
}

// grows reports whether the cost grows by more than the noise floor, law or no law.
func (f fitResult) grows(floor float64) bool {
	return f.model != Constant && f.low > 0 && f.rise > floor
}

// fit judges how the cost grows. docs/method.md has the reasons.
func fit(rungs []rung, noise aaNoise, rng *rand.Rand) fitResult {
	k := len(rungs)
	if k < 2 {
		return fitResult{model: Undecided, slope: math.NaN(), low: math.NaN(), high: math.NaN(), rise: math.NaN(), bound: math.NaN(),
			note: "a single rung"}
	}
	line := newShape(rungs, func(n float64) float64 { return n })
	if !slices.ContainsFunc(rungs, func(r rung) bool { return len(r.values) > 1 }) {
		// The residuals of a line alone would give an interval; of what one measurement scatters they say nothing.
		s := line.fit(line.medians)
		return fitResult{model: Undecided, slope: s.slope, low: math.NaN(), high: math.NaN(), rise: s.slope * line.span, bound: math.NaN(),
			note: "one measurement a rung: no interval"}
	}
	// A rung without a Service stands at one: log n begins there.
	curve := newShape(rungs, func(n float64) float64 { return math.Log(max(n, 1)) })
	if k == 2 && len(noise.effects) == 0 {
		s := line.fit(line.medians)
		return fitResult{model: Undecided, slope: s.slope, low: math.NaN(), high: math.NaN(), rise: s.slope * line.span, bound: math.NaN(),
			note: "two rungs and no A/A pair: no interval"}
	}
	lineFit := line.fit(line.medians)
	slopes, rises := bootstrap(rungs, line, curve, noise.effects, rng)

	out := fitResult{slope: lineFit.slope, low: slopes[0], high: slopes[1], rise: lineFit.slope * line.span}
	out.bound = max(math.Abs(slopes[0]*line.span), math.Abs(slopes[1]*line.span), math.Abs(rises[0]), math.Abs(rises[1]))
	if !noise.known {
		out.model, out.note = Undecided, "no A/A pair measured this: the noise floor is not known"
		return out
	}
	if out.bound < noise.floor {
		out.model = Constant
		return out
	}
	if k < minRungs {
		out.model, out.note = Undecided, fmt.Sprintf("%d rungs: a growth law needs %d", k, minRungs)
		return out
	}
	constant := aicc(constantRSS(rungs, line.medians), k, 2)
	linear, logarithmic := aicc(lineFit.rss, k, 3), aicc(curve.fit(curve.medians).rss, k, 3)
	best, other, model := linear, logarithmic, Linear
	lower := lowerBound(slopes[0]*line.span, slopes[1]*line.span)
	least := min(lower, lowerBound(rises[0], rises[1])) // by both laws
	if logarithmic < linear {
		best, other, model = logarithmic, linear, Logarithmic
		out.rise = curve.fit(curve.medians).slope * curve.span
		lower = lowerBound(rises[0], rises[1])
	}
	beyond := math.Abs(out.rise) > noise.floor
	switch {
	case lower > noise.floor, beyond && best < constant:
		if other-best < aiccMargin {
			out.model, out.note = Undecided, "grows; O(log n) and O(n) fit alike"
			return out
		}
		out.model = model
	case beyond && least > 0:
		out.model, out.note = Undecided, "rises by more than the floor, but neither like O(log n) nor like O(n)"
	default:
		out.model, out.note = Constant, "by AICc"
		if lowerBound(slopes[0], slopes[1]) > 0 {
			out.note = "by AICc; what it rises by is less than the noise floor"
		}
	}
	return out
}

// Slope is what each Service adds to a cost, in the cost's unit per Service: the slope of the straight line through the medians of mode minus
// floor, and its 95 % bootstrap interval, as verdicts have them where no A/A pair measured the noise. mode[i] and floor[i] are the rounds at
// services[i], which rises; round r of the one was measured beside round r of the other. It takes three rungs of two rounds each. Equal seeds give equal intervals.
func Slope(services []int, mode, floor [][]float64, seed int64) (slope, low, high float64) {
	rungs := make([]rung, len(services))
	for i, n := range services {
		rungs[i] = rung{services: float64(n), scale: math.Hypot(median(mode[i]), median(floor[i]))}
		for round, cost := range mode[i] {
			rungs[i].values = append(rungs[i].values, cost-floor[i][round])
		}
	}
	f := fit(positiveScales(rungs), aaNoise{}, source(seed, "slope"))
	return f.slope, f.low, f.high
}

// lowerBound returns the least |x| in [low, high].
func lowerBound(low, high float64) float64 {
	if low <= 0 && high >= 0 {
		return 0
	}
	return min(math.Abs(low), math.Abs(high))
}

// shape is a weighted least-squares problem y = a + b·x over the rungs, of which only y changes.
type shape struct {
	x, weights, medians []float64
	mean, sxx           float64 // weighted
	span                float64 // x of the largest rung minus that of the smallest
}

type shapeFit struct {
	intercept, slope float64
	rss              float64 // of standardised residuals
}

func newShape(rungs []rung, f func(float64) float64) shape {
	var s shape
	for _, r := range rungs {
		s.x = append(s.x, f(r.services))
		s.weights = append(s.weights, 1/(r.scale*r.scale))
		s.medians = append(s.medians, median(r.values))
	}
	s.mean = stat.Mean(s.x, s.weights)
	for i, x := range s.x {
		s.sxx += s.weights[i] * (x - s.mean) * (x - s.mean)
	}
	s.span = s.x[len(s.x)-1] - s.x[0]
	return s
}

func (s *shape) fit(y []float64) shapeFit {
	var sw, sy, sxy float64
	for i, w := range s.weights {
		sw += w
		sy += w * y[i]
		sxy += w * (s.x[i] - s.mean) * y[i]
	}
	f := shapeFit{slope: sxy / s.sxx}
	f.intercept = sy/sw - f.slope*s.mean
	for i, w := range s.weights {
		e := y[i] - f.intercept - f.slope*s.x[i]
		f.rss += w * e * e
	}
	return f
}

func constantRSS(rungs []rung, y []float64) float64 {
	weights := make([]float64, len(rungs))
	for i, r := range rungs {
		weights[i] = 1 / (r.scale * r.scale)
	}
	mean, rss := stat.Mean(y, weights), 0.0
	for i, w := range weights {
		rss += w * (y[i] - mean) * (y[i] - mean)
	}
	return rss
}

// aicc is Akaike's criterion with the small-sample correction for n points and p parameters, the variance among them. The points
// are rung medians, so that the rung-to-rung effect is part of the variance: rounds within a rung are not independent.
func aicc(rss float64, n, p int) float64 {
	return float64(n)*math.Log(max(rss, math.SmallestNonzeroFloat64)/float64(n)) + 2*float64(p) + 2*float64(p*(p+1))/float64(n-p-1)
}

// bootstrap returns the 95 % intervals of the line's slope and of the curve's rise over the ladder. Each resample draws rung
// effects, then rounds within each rung.
//
// Note: drawing whole rungs was tried. A third of such draws lacks the largest of six rungs, which carries most of what is known
// about the slope, and with three rungs every ninth draw is one rung thrice. The ladder is chosen, not sampled: what
// is random about a rung is its effect, so effects are drawn (residual bootstrap) and the ladder stays.
func bootstrap(rungs []rung, line, curve shape, noise []float64, rng *rand.Rand) (slope, rise [2]float64) {
	a, b := line.fit(line.medians), curve.fit(curve.medians)
	la := newEffects(rungs, line, a, noise)
	lb := newEffects(rungs, curve, b, noise)
	k := len(rungs)
	sorted, counts := make([][]float64, k), make([][]int, k)
	for i, r := range rungs {
		sorted[i] = slices.Sorted(slices.Values(r.values))
		counts[i] = make([]int, len(r.values))
	}
	slopes, rises := make([]float64, resamples), make([]float64, resamples)
	ya, yb := make([]float64, k), make([]float64, k)
	within := make([]float64, k)
	deviations := make([][]float64, resamples)
	for n := range deviations {
		d := make([]float64, k)
		for i := range rungs {
			d[i] = resampledMedian(rng, sorted[i], counts[i]) - line.medians[i]
			within[i] += d[i] * d[i]
		}
		deviations[n] = d
	}
	var v float64 // mean variance of a rung's median through its rounds, standardised
	for i, r := range rungs {
		v += within[i] / float64(resamples) / (r.scale * r.scale) / float64(k)
	}
	la.leave(v)
	lb.leave(v)
	for n, d := range deviations {
		for i, r := range rungs {
			ya[i] = a.intercept + a.slope*line.x[i] + r.scale*la.draw(rng) + d[i]
			yb[i] = b.intercept + b.slope*curve.x[i] + r.scale*lb.draw(rng) + d[i]
		}
		slopes[n] = line.fit(ya).slope
		rises[n] = curve.fit(yb).slope * curve.span
	}
	return la.interval(slopes, a.slope), lb.interval(rises, b.slope*curve.span)
}

// effects draws rung effects.
type effects struct {
	pool     []float64 // mean 0, variance 1
	variance float64   // of an effect plus what the rounds leave in a median, standardised
	sd       float64   // of an effect alone, after leave
	widen    float64   // Student's t over the normal quantile
}

// newEffects pools the residuals of the fit with those of the A/A pair.
func newEffects(rungs []rung, s shape, f shapeFit, noise []float64) *effects {
	e := &effects{}
	own := make([]float64, len(rungs))
	for i, r := range rungs {
		own[i] = (s.medians[i] - f.intercept - f.slope*s.x[i]) / r.scale
	}
	e.pool = append(append(e.pool, own...), noise...)
	dof := float64(len(rungs) - 2)
	ownRSS, allRSS, allDOF := 0.0, 0.0, dof
	for _, x := range own {
		ownRSS += x * x
	}
	allRSS = ownRSS
	if len(noise) > 0 {
		allDOF += float64(len(noise) - 1)
		for _, x := range noise {
			allRSS += x * x
		}
	}
	e.variance = allRSS / allDOF
	if dof > 0 {
		// A mode whose rungs scatter more than those of the A/A pair keeps its own scatter.
		e.variance = max(e.variance, ownRSS/dof)
	}
	mean, sd := stat.PopMeanStdDev(e.pool, nil)
	for i := range e.pool {
		if sd > 0 {
			e.pool[i] = (e.pool[i] - mean) / sd
		} else {
			e.pool[i] = 0
		}
	}
	tail := 1 - (1-confidence)/2
	e.widen = distuv.StudentsT{Sigma: 1, Nu: allDOF}.Quantile(tail) / distuv.UnitNormal.Quantile(tail)
	return e
}

// leave takes from the variance the part v that drawing rounds puts back.
func (e *effects) leave(v float64) { e.sd = math.Sqrt(max(0, e.variance-v)) }

func (e *effects) draw(rng *rand.Rand) float64 { return e.sd * e.pool[rng.IntN(len(e.pool))] }

// interval returns the percentile interval of draws about center, widened for the few rungs that it comes from.
func (e *effects) interval(draws []float64, center float64) [2]float64 {
	slices.Sort(draws)
	tail := (1 - confidence) / 2
	return [2]float64{
		center + e.widen*(quantile(tail, draws)-center),
		center + e.widen*(quantile(1-tail, draws)-center),
	}
}
