// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// providers are all providers. The list stands here because each lives in a package of its own.
var providers = []clusters.Provider{
	lab.Provider{},
	kind.Provider{},
	guest.Provider{},
}

// autoProvider lets what is found here choose.
const autoProvider = "auto"

// findProvider is the provider of that name. The error lists the names that there are.
func findProvider(name string) (clusters.Provider, error) {
	names := make([]string, len(providers))
	for i, p := range providers {
		if p.Name() == name {
			return p, nil
		}
		names[i] = p.Name()
	}
	return nil, fmt.Errorf("provider %q is not one of %s, %s", name, autoProvider, strings.Join(names, ", "))
}

// chooseProvider is kind where a container engine answers and a node image can be had, and else the lab; said is why, in a line.
func chooseProvider(ctx context.Context, plan scenarios.Plan) (p clusters.Provider, said string) {
	if err := kind.Available(ctx, plan.NodeImage, plan.Cache); err != nil {
		return lab.Provider{}, fmt.Sprintf("provider lab, because kind is not possible: %v", err)
	}
	return kind.Provider{}, "provider kind: a container engine answers, with a node image; --provider lab (make bench PROVIDER=lab) measures without"
}
