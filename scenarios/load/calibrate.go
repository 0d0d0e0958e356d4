// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"fmt"
	"slices"
	"time"
)

const (
	// calibrateTurn is how long a calibration stays on one CPU before it goes on on the next.
	calibrateTurn = 50 * time.Millisecond
	// touched is how much slower than at the fastest readings a connect is at a reading that says: disturbed.
	touched = 1.03
	// binSlices and binWidth bound a bin from below: as many slices as its median needs to repeat within half a percent, and
	// as wide as the reference itself scatters at one speed.
	binSlices = 25
	binWidth  = 1.01
	// leastSlices is what a calibration must see to say anything.
	leastSlices = 4 * binSlices
)

// reading is one slice of a calibration: the mean of the references around it, and the median of its connects.
type reading struct {
	reference, connect time.Duration
}

// calibrate connects for as long as the request's limit, on one CPU after the other, and finds Reply.Quiet.
func (c *connects) calibrate(ctx context.Context) error {
	cpus, err := newCPUs()
	if err != nil {
		return err
	}
	c.base = time.Now()
	var seen []reading
	var w window
	var took []int64
	var last time.Duration // median of a slice that is not judged yet, 0 for none
	arrived := -calibrateTurn
	for !c.over(ctx, time.Since(c.base)) {
		if time.Since(c.base)-arrived >= calibrateTurn {
			if err := cpus.hop(); err != nil {
				return err
			}
			arrived, w, last = time.Since(c.base), window{}, 0
		}
		var cold bool
		if took, cold, err = c.slice(&w, took[:0]); err != nil {
			return err
		}
		if mean, known := w.mean(); known && last > 0 {
			seen = append(seen, reading{mean, last})
		}
		last = 0
		if !cold && len(took) > 0 {
			slices.Sort(took)
			last = time.Duration(took[len(took)/2])
		}
	}
	c.reply.Began, c.reply.Elapsed = c.base, time.Since(c.base)
	if err := ctx.Err(); err != nil {
		return err
	}
	c.reply.Quiet, err = quietLimit(seen)
	return err
}

// quietLimit is the slowest reading of the reference up to which connects are as fast as at its fastest readings, where a reading is a window's mean.
//
// A machine shows by its connects which readings mean a disturbance. On one, another hardware thread in the core made the
// reference slower by 25 % and connects by 15 to 45 %, and undisturbed readings lay within 3 %; on another, getppid(2) itself
// took up to 14 % longer for seconds at a time, at which connects took 2 % longer.
func quietLimit(seen []reading) (time.Duration, error) {
	if len(seen) < leastSlices {
		return 0, fmt.Errorf("calibrate: %d slices of connects, at least %d are needed", len(seen), leastSlices)
	}
	slices.SortFunc(seen, func(a, b reading) int { return int(a.reference - b.reference) })
	// The very fastest readings are luck.
	fastest := seen[len(seen)/50].reference
	medianConnect := func(bin []reading) time.Duration {
		took := make([]time.Duration, len(bin))
		for i, r := range bin {
			took[i] = r.connect
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	// end is where the bin that begins at first ends: so wide, and of so many slices; past the last when there are too few.
	end := func(first int, width float64) int {
		i := first + binSlices
		for i < len(seen) && float64(seen[i].reference) < width*float64(seen[first].reference) {
			i++
		}
		return i
	}
	// The base is everything within the scatter of the reference at one speed.
	next := binSlices
	for next < len(seen) && float64(seen[next].reference) < touched*float64(fastest) {
		next++
	}
	base := medianConnect(seen[:next])
	for next < len(seen) {
		to := end(next, binWidth)
		if to > len(seen) || float64(medianConnect(seen[next:to])) > touched*float64(base) {
			break
		}
		next = to
	}
	return seen[next-1].reference, nil
}
